"""A torch.export program: PyTorch alone runs it, from Python or from C++."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from nampruner.export.files import not_exported, packed, published, quiet
from nampruner.export.parity import (
    Inputs,
    Runner,
    arrays_of,
    as_tuple,
    batches_of,
    compare,
    pair_of,
    require,
    settled,
)
from nampruner.plan import Parity
from nampruner.progress import Progress, Silent


def export_pt2(
    model: nn.Module,
    path: Path | str,
    example_inputs: Inputs,
    *,
    inputs: Inputs | None = None,
    tolerance: float = 1e-4,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Parity:
    """Write `model` as a torch.export program with a free batch size, and prove it on `inputs`.

    `torch.export.load(path).module()` runs it, on the CPU; `torch.export.passes` moves it to
    another device. The model is exported in eval mode and left as it was.

    Args:
        example_inputs: a batch [N, …], or a tuple of them; only its shape and type matter.
        inputs: real inputs [M, …] for the proof; the example inputs where there are none.
        tolerance: largest difference allowed, relative to the largest output.
        metadata: what the file shall say of itself, for `read_metadata`.

    Returns:
        How close the file, read again, comes to the model on `inputs`.

    Raises:
        ParityError: further apart than `tolerance`; a file that was there before stays.
        NamPrunerError: the network cannot be exported.
    """
    example = as_tuple(example_inputs)
    real = example if inputs is None else as_tuple(inputs)
    steps = 2 + len(batches_of(real))
    with (progress or Silent()).bar("export", steps) as bar, settled(model) as here:
        program = _program(here, example)
        bar.advance()
        with published(Path(path), ".pt2") as draft:
            # an open file, as the name of a path would stand in the archive
            with draft.open("wb") as file, quiet():
                torch.export.save(program, file, extra_files=packed(metadata))
            del program
            again = _read_again(draft)
            bar.advance()
            parity = compare(here, again, real, bar)
            require(parity, tolerance, "the program")
    return parity


def _program(model: nn.Module, example: tuple[Tensor, ...]) -> ExportedProgram:
    """Trace at batch 2, and forget where our code lies and what it was traced on."""
    shapes = tuple({0: Dim("batch")} for _ in example)
    try:
        with quiet():
            program = torch.export.export(model, pair_of(example), dynamic_shapes=shapes)
    except Exception as error:  # torch.export's errors have no common base
        raise not_exported(model, str(error)) from error
    for graph in program.graph_module.modules():
        for node in getattr(graph, "graph", program.graph).nodes:
            node.meta.pop("stack_trace", None)
    program._example_inputs = None
    return program


def _read_again(path: Path) -> Runner:
    with quiet():
        module = torch.export.load(path).module()
    return lambda batch: arrays_of(module(*batch))
