"""A folder that rebuilds a slim network without nampruner: `model.safetensors` and `model.py`."""

import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors.torch import save_model
from torch import Tensor, nn

from nampruner.checkpoint import appearing
from nampruner.errors import NamPrunerError
from nampruner.export import standalone
from nampruner.export.code import literal
from nampruner.export.difference import Difference, difference
from nampruner.export.files import WEIGHTS, packed, quiet
from nampruner.export.origin import COPY, Origin, origin_of
from nampruner.export.parity import (
    Inputs,
    arrays_of,
    as_tuple,
    batches_of,
    compare,
    require,
    settled,
    tensors_of,
)
from nampruner.lineage import lineage
from nampruner.nam import attention_weight
from nampruner.plan import Parity
from nampruner.progress import Progress, Silent
from nampruner.surgery import sync_shape

CODE = "model.py"
_OURS = {WEIGHTS, CODE, f"{COPY}.py", "__pycache__"}
_LONGEST_NOTE = 120
"""Longer metadata stays in the weights file alone."""


def export_python(
    model: nn.Module,
    folder: Path | str,
    example_inputs: Inputs,
    *,
    inputs: Inputs | None = None,
    original: str | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Parity:
    """Write `model` as weights and a short `model.py` that builds it with its own library only.

    `model.py` builds the original, sets what was changed, and loads strictly. Before the folder
    appears, a fresh process that cannot import nampruner runs it: its outputs must be the same bits
    as those of `model` on the CPU.

    Args:
        example_inputs: a batch [N, …], or a tuple of them; only its shape and type matter.
        inputs: real inputs [M, …] for the proof; the example inputs where there are none.
        original: the expression that builds the network before the cut, such as
            `timm.create_model('resnet18')`; needed where `nampruner.build` did not build it. A
            source that is user code (`file.py:function`) is run only if it is given here; that
            file is copied beside `model.py`.
        metadata: what the export shall say of itself, for `read_metadata`.

    Returns:
        The comparison on `inputs`; its differences are 0.

    Raises:
        ParityError: `model.py` gives other outputs.
        NamPrunerError: the folder is another's; it is not known how the original was built; or the
            network differs from it in more than data can say.
    """
    target, example = Path(folder), as_tuple(example_inputs)
    check_folder(target)
    real = example if inputs is None else as_tuple(inputs)
    with (progress or Silent()).bar("export", 2 + len(batches_of(real))) as bar:
        slim = _plain_copy(model)
        with quiet():
            origin = origin_of(lineage(model), original)
            diff = difference(origin.module, slim)
        bar.advance()
        with appearing(target) as draft, settled(slim):
            _write(draft, slim, origin, diff, example=example, metadata=dict(metadata or {}))
            elsewhere = iter(_run_elsewhere(draft, real))
            bar.advance()
            parity = compare(slim, lambda _: arrays_of(next(elsewhere)), real, bar)
            require(parity, 0.0, CODE)
    return parity


def check_folder(folder: Path) -> None:
    """See that writing `folder` destroys nothing of anybody else's.

    Raises:
        NamPrunerError: it is a file, or holds what no export writes.
    """
    if folder.exists() and not folder.is_dir():
        raise NamPrunerError(f"{folder} is a file; give the name of a folder")
    foreign = sorted({path.name for path in folder.iterdir()} - _OURS) if folder.exists() else []
    if foreign:
        raise NamPrunerError(
            f"{folder} exists and holds {', '.join(foreign[:3])}; give another folder"
        )


def _plain_copy(model: nn.Module) -> nn.Module:
    """Copy to the CPU, as it comes back from files: no memory formats, attributes say the sizes."""
    copy = deepcopy(model).cpu()
    for tensor in (*copy.parameters(), *copy.buffers()):
        # `contiguous` would leave the strides of a 1×1 kernel alone, and they choose the algorithm
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    for module in copy.modules():
        sync_shape(module)
    return copy


def _write(
    folder: Path,
    slim: nn.Module,
    origin: Origin,
    diff: Difference,
    *,
    example: tuple[Tensor, ...],
    metadata: dict[str, str],
) -> None:
    for name in diff.tensors:  # `model.py` makes a state dict hold them
        path, _, key = name.rpartition(".")
        slim.get_submodule(path)._non_persistent_buffers_set.discard(key)
    save_model(slim, str(folder / WEIGHTS), metadata=packed(metadata))
    (folder / WEIGHTS).chmod(0o644)  # safetensors leaves it to the owner alone
    (folder / CODE).write_text(_render(origin, diff, example, metadata), encoding="utf-8")
    if origin.file is not None:
        shutil.copyfile(origin.file, folder / f"{COPY}.py")


def _render(
    origin: Origin, diff: Difference, example: tuple[Tensor, ...], metadata: dict[str, str]
) -> str:
    environment = Environment(
        loader=PackageLoader("nampruner", "templates"),
        autoescape=False,  # not markup: what is data goes through `literal`
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["literal"] = literal
    notes = {key: text for key, text in metadata.items() if len(text) <= _LONGEST_NOTE}
    carried = (*origin.carried, *_helpers(diff))
    return environment.get_template("model.py.j2").render(
        version=version("nampruner"),
        packages=_listed(["torch", *origin.packages, "safetensors"]),
        takes=_listed([_shape(x) for x in example]),
        notes=[f"{literal(key)}: {literal(text)}" for key, text in notes.items()],
        imports=_imports(origin, diff),
        versioned=_versioned(origin.module),
        origin=origin,
        diff=diff,
        sources=[inspect.getsource(part).rstrip() for part in carried],
    )


def _helpers(diff: Difference) -> list[Any]:
    """Return what `model.py` needs of `standalone` for this difference."""
    helpers: list[Any] = []
    if diff.nam:
        helpers += [attention_weight, standalone.ChannelNAM, standalone.SpatialNAM]
        helpers += [standalone.NAM, standalone.attach]
    if diff.attributes:
        helpers.append(standalone.resize)
    if diff.attributes or diff.tensors:
        helpers.append(standalone.put_empty)
    return helpers


def _imports(origin: Origin, diff: Difference) -> list[str]:
    """Return the import statements, the standard library's first, sorted."""
    standard = ["from pathlib import Path"]
    if _versioned(origin.module):
        standard.insert(0, "from collections import OrderedDict")
    if origin.file is not None:
        standard.insert(-1, "from importlib.util import module_from_spec, spec_from_file_location")
    reader = "load_file" if _versioned(origin.module) else "load_model"
    others = {f"from safetensors.torch import {reader}", "from torch import nn", *origin.imports}
    if diff.nam or origin.carried:
        others = {*others - {"from torch import nn"}, "from torch import Tensor, nn"}
    if any("Conv2dSame(" in layer for layer in diff.plain.values()):
        others.add("from timm.layers import Conv2dSame")
    if _helpers(diff) or "torch." in origin.call:
        others.add("import torch")
    # `import` before `from`, as formatters have it
    return [*standard, "", *sorted(others, key=lambda line: (line.startswith("from"), line))]


def _versioned(model: nn.Module) -> bool:
    """Say whether a layer refuses weights that do not say which version of it they are for."""
    return any(
        module._version > 1
        and "_load_from_state_dict" in vars(type(module))
        and not type(module).__module__.startswith("torch.nn.")
        for module in model.modules()
    )


def _shape(example: Tensor) -> str:
    sizes = ", ".join(["N", *map(str, example.shape[1:])])
    return f"[{sizes}] {str(example.dtype).removeprefix('torch.')}"


def _listed(words: list[str]) -> str:
    unique = list(dict.fromkeys(words))
    return " and ".join([", ".join(unique[:-1]), unique[-1]] if len(unique) > 1 else unique)


_ELSEWHERE = f"""
import sys
sys.modules["nampruner"] = None  # importing it is an error from here on
from collections.abc import Mapping
from typing import Any
import torch
from torch import Tensor
{inspect.getsource(tensors_of)}
folder, work, threads = sys.argv[1:]
sys.path.insert(0, folder)
torch.set_num_threads(int(threads))
from model import build
model, batches = build(), torch.load(work + "/given.pt", weights_only=True)
with torch.no_grad():
    torch.save([tensors_of(model(*batch)) for batch in batches], work + "/found.pt")
"""


def _run_elsewhere(folder: Path, inputs: tuple[Tensor, ...]) -> list[Any]:
    """Return what `model.py` makes of each batch, in a process without nampruner.

    Raises:
        NamPrunerError: it does not run.
    """
    with tempfile.TemporaryDirectory(prefix="nampruner-") as work:
        torch.save([tuple(x.cpu() for x in b) for b in batches_of(inputs)], f"{work}/given.pt")
        # the folder a user's own package may lie in is not known to a new process
        paths = os.pathsep.join(path or os.getcwd() for path in [*sys.path, ""])
        done = subprocess.run(
            [sys.executable, "-B", "-c", _ELSEWHERE, folder, work, str(torch.get_num_threads())],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise NamPrunerError(
                f"{CODE} does not run without nampruner: {reason[0]}; export onnx or pt2, or let "
                "the original be built by what is installed elsewhere"
            )
        found: list[Any] = torch.load(f"{work}/found.pt", weights_only=True)
    return found
