"""INT8: a static QDQ file by onnxruntime.quantization, where what INT8 cannot carry stays float.

Weights are int8 per output channel, in 7 bits: processors without VNNI add pairs of products in 16
bits, and full int8 weights overflow there without a word. Activations are uint8; ONNX Runtime has
no fast kernels for int8 ones on x86.
"""

import copy
import tempfile
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import onnx
from onnxruntime.quantization import (
    QDQQuantizer,
    QuantType,
    TensorsData,
    quant_pre_process,
)
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from torch import nn

from nampruner.errors import NamPrunerError, ParityError
from nampruner.export.files import published, quiet
from nampruner.export.judges import WAY_OUT, Batch, Judge, TopOne
from nampruner.export.onnx import graph_of, runner_of, save
from nampruner.export.parity import Inputs, arrays_of, as_tuple, batches_of, gaps_of, settled
from nampruner.export.ranges import ranges_of
from nampruner.int8 import Int8, KeptFloat
from nampruner.plan import Parity
from nampruner.progress import Progress, Silent

_OPS = sorted({*QDQRegistry, *QLinearOpsRegistry})


def export_int8(
    model: nn.Module,
    path: Path | str,
    calibration: Iterable[Inputs],
    *,
    inputs: Iterable[Inputs] | None = None,
    agreement: float = 0.99,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Int8:
    """Write a classifier as an INT8 ONNX file with a free batch size, and prove it on `inputs`.

    All nodes become INT8 if that keeps enough of the float network's top-1 answers on calibration
    inputs: half of the disagreement that is allowed. If not, each node is made INT8 alone, and the
    fewest of those with the largest output error stay float. For detectors there is
    `nampruner.yolo.export_int8`.

    Args:
        calibration: batches of inputs [N, …], no labels; they give the ranges of activations.
        inputs: batches of other real inputs for the proof; the calibration inputs where there are
            none.
        agreement: smallest share of the proof's inputs whose top-1 answer is that of `model`.
        metadata: what the file shall say of itself, for `read_metadata`.

    Raises:
        ParityError: they agree on less; a file that was there before stays.
        NamPrunerError: there is nothing to calibrate on, the outputs are no classes [N, C, …], or
            the network cannot be exported.
    """
    return export_judged(
        model,
        path,
        calibration,
        TopOne(agreement),
        inputs=inputs,
        metadata=metadata,
        progress=progress,
    )


def export_judged(
    model: nn.Module,
    path: Path | str,
    calibration: Iterable[Inputs],
    judge: Judge,
    *,
    inputs: Iterable[Inputs] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Int8:
    """Do what `export_int8` does, where `judge` says what is near enough.

    Raises:
        ParityError: it is not; a file that was there before stays.
        NamPrunerError: see `export_int8`.
    """
    told = progress or Silent()
    batches = [tuple(x.cpu() for x in as_tuple(batch)) for batch in calibration]
    if not batches:
        raise NamPrunerError("INT8 needs calibration inputs; give batches of inputs")
    with settled(model) as here, tempfile.TemporaryDirectory(prefix="nampruner-") as folder:
        with told.bar("export", 2) as bar:
            proto = graph_of(here, batches[0], bar)
        trials = _Trials(judge, Path(folder), metadata)
        trials.start(proto, batches)
        quantizer = _calibrated(proto, batches, Path(folder), judge.stays)
        kept = _choose(quantizer, trials, told)
        with published(Path(path), ".onnx") as draft:
            save(quantizer.without([each.node for each in kept]), draft, metadata)
            proof = batches if inputs is None else map(as_tuple, inputs)
            found = Int8(
                parity=_proven(here, draft, proof, told),
                quantized=len(quantizer.nodes) - len(kept),
                kept_float=kept,
                calibration=sum(len(batch[0]) for batch in batches),
            )
            judge.prove(draft, found.parity)
    return found


@dataclass(frozen=True)
class _Quantizer:
    """A float graph and the ranges of its activations."""

    proto: onnx.ModelProto
    ranges: TensorsData
    nodes: tuple[str, ...]
    """What can be INT8."""

    def without(self, kept: Collection[str]) -> onnx.ModelProto:
        """Make all nodes INT8 but these."""
        return self.only([node for node in self.nodes if node not in kept])

    def only(self, nodes: Collection[str]) -> onnx.ModelProto:
        """Make these nodes INT8."""
        if not nodes:
            return self.proto
        with quiet():
            quantizer = QDQQuantizer(
                copy.deepcopy(self.proto),
                per_channel=True,
                reduce_range=True,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=self.ranges,
                nodes_to_quantize=list(nodes),
                nodes_to_exclude=[],
                op_types_to_quantize=_OPS,
                extra_options={},
            )
            quantizer.quantize_model()
        found: onnx.ModelProto = quantizer.model.model
        return found


def _calibrated(
    proto: onnx.ModelProto, batches: list[Batch], folder: Path, stays: Sequence[str]
) -> _Quantizer:
    """Prepare the graph as ONNX Runtime wants it, and measure the range of every activation."""
    plain, ready = folder / "plain.onnx", folder / "ready.onnx"
    onnx.save(proto, str(plain))
    with quiet():
        quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
    prepared = onnx.load(str(ready))
    for number, node in enumerate(prepared.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    onnx.save(prepared, str(ready))
    able = [node.name for node in prepared.graph.node if node.op_type in _OPS]
    staying = _staying(prepared.graph, stays)
    nodes = tuple(name for name in able if name not in staying)
    return _Quantizer(prepared, ranges_of(ready, batches, _OPS), nodes)


def _staying(graph: onnx.GraphProto, globs: Sequence[str]) -> set[str]:
    """Return the nodes that match, and all that compute with what these give."""
    names: set[str] = set()
    values: set[str] = set()
    for node in graph.node:
        matches = any(fnmatchcase(node.name, glob) for glob in globs)
        if matches or not values.isdisjoint(node.input):
            names.add(node.name)
            values.update(node.output)
    return names


class _Trials:
    """Writes candidates where a judge reads them; one at a time."""

    def __init__(self, judge: Judge, folder: Path, metadata: Mapping[str, str] | None) -> None:
        self.judge, self._folder, self._metadata = judge, folder, metadata

    def start(self, proto: onnx.ModelProto, batches: list[Batch]) -> None:
        self.judge.start(self._written(proto, "float"), batches)

    def enough(self, proto: onnx.ModelProto) -> bool:
        return self.judge.enough(self._written(proto, "candidate"))

    def error(self, proto: onnx.ModelProto) -> float:
        return self.judge.error(self._written(proto, "candidate"))

    def _written(self, proto: onnx.ModelProto, name: str) -> Path:
        path = self._folder / f"{name}.onnx"
        save(proto, path, self._metadata)
        return path


def _choose(quantizer: _Quantizer, trials: _Trials, progress: Progress) -> tuple[KeptFloat, ...]:
    """Return what has to stay float so that the judge finds enough kept on calibration inputs.

    Raises:
        ParityError: not even with every second node in float.
    """
    if trials.enough(quantizer.without(())):
        return ()
    felt = []
    with progress.bar("sensitivity", len(quantizer.nodes)) as bar:
        for node in quantizer.nodes:
            felt.append(KeptFloat(node=node, error=trials.error(quantizer.only([node]))))
            bar.advance()
    felt.sort(key=lambda each: -each.error)

    def enough(count: int) -> bool:
        return trials.enough(quantizer.without([each.node for each in felt[:count]]))

    most = len(felt) // 2
    count = bisect_left(range(most + 1), True, lo=1, key=enough)
    if count > most:
        raise ParityError(
            f"INT8 does not keep {trials.judge.asked} on calibration inputs, even with "
            f"{most} of {len(felt)} nodes in float; the worst is {felt[0].node}. {WAY_OUT}"
        )
    return tuple(felt[:count])


def _proven(model: nn.Module, path: Path, batches: Iterable[Batch], progress: Progress) -> Parity:
    """Compare a file with the model; the first input goes alone, to prove batch 1 too."""
    run, gaps, seen = runner_of(path), gaps_of(model), 0
    with progress.bar("agreement", 1) as bar:
        for batch in batches:
            for part in batches_of(batch):
                ours = tuple(x.cpu() for x in part)
                gaps.add(arrays_of(model(*ours)), run(ours))
            seen += len(batch[0])
        bar.advance()
    # boxes of INT8 are others; how good they are is the judge's question
    return gaps.parity(seen).model_copy(update={"boxes": None})
