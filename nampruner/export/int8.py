"""INT8: a static QDQ file by onnxruntime.quantization, where what INT8 cannot carry stays float.

Weights are int8 per output channel, in 7 bits: processors without VNNI add pairs of products in 16
bits, and full int8 weights overflow there without a word. Activations are uint8; ONNX Runtime has
no fast kernels for int8 ones on x86.
"""

import copy
import tempfile
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    QDQQuantizer,
    QuantType,
    TensorsData,
    quant_pre_process,
)
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from torch import Tensor, nn

from nampruner.errors import NamPrunerError, ParityError
from nampruner.export.files import published, quiet
from nampruner.export.onnx import graph_of, runner_of, save
from nampruner.export.parity import Gaps, Inputs, arrays_of, as_tuple, batches_of, settled
from nampruner.export.ranges import ranges_of
from nampruner.latency import Array
from nampruner.plan import Int8, KeptFloat, Parity
from nampruner.progress import Progress, Silent

_OPS = sorted({*QDQRegistry, *QLinearOpsRegistry})
_JUDGED = 512
"""Calibration inputs on which agreement is judged while nodes are chosen."""
_FELT = 32
"""Calibration inputs on which the error of one node alone is measured."""

_WAY_OUT = (
    "Nothing was written; give more calibration inputs or a lower agreement, or export it as "
    "float or half"
)

Batch = tuple[Tensor, ...]


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
    fewest of those with the largest output error stay float.

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
    told = progress or Silent()
    batches = [tuple(x.cpu() for x in as_tuple(batch)) for batch in calibration]
    if not batches:
        raise NamPrunerError("INT8 needs calibration inputs; give batches of inputs")
    with settled(model) as here, tempfile.TemporaryDirectory(prefix="nampruner-") as folder:
        with told.bar("export", 2) as bar:
            proto = graph_of(here, batches[0], bar)
        quantizer = _calibrated(proto, batches, Path(folder))
        judge = _Judge(proto, batches, Path(folder))
        kept = _choose(quantizer, judge, 1 - (1 - agreement) / 2, told)
        with published(Path(path), ".onnx") as draft:
            save(quantizer.without([each.node for each in kept]), draft, metadata)
            proof = batches if inputs is None else map(as_tuple, inputs)
            found = Int8(
                parity=_proven(here, draft, proof, told),
                quantized=len(quantizer.nodes) - len(kept),
                kept_float=kept,
                calibration=sum(len(batch[0]) for batch in batches),
            )
            _require(found, agreement)
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


def _calibrated(proto: onnx.ModelProto, batches: list[Batch], folder: Path) -> _Quantizer:
    """Prepare the graph as ONNX Runtime wants it, and measure the range of every activation."""
    plain, ready = folder / "plain.onnx", folder / "ready.onnx"
    onnx.save(proto, str(plain))
    with quiet():
        quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
    prepared = onnx.load(str(ready))
    for number, node in enumerate(prepared.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    onnx.save(prepared, str(ready))
    nodes = tuple(node.name for node in prepared.graph.node if node.op_type in _OPS)
    return _Quantizer(prepared, ranges_of(ready, batches, _OPS), nodes)


class _Judge:
    """Compares INT8 graphs with the float one on calibration inputs."""

    def __init__(self, proto: onnx.ModelProto, batches: list[Batch], folder: Path) -> None:
        self._folder = folder
        self._few = [tuple(x[:_FELT] for x in batches[0])]
        self._many = list(_first(batches, _JUDGED))
        self._want = self._outputs(proto, self._many)
        logits = self._want[0][0]
        if logits.ndim < 2 or logits.shape[1] < 2:
            raise NamPrunerError(
                f"the network gives {list(logits.shape)}, no classes [N, C, …]; INT8 is judged by "
                "top-1 agreement, so export it as float or half"
            )

    def agreement(self, proto: onnx.ModelProto) -> float:
        """Return the share of inputs whose top-1 answer is that of the float graph."""
        gaps = Gaps()
        for want, have in zip(self._want, self._outputs(proto, self._many), strict=True):
            gaps.add(want, have)
        return gaps.parity(0).top1_agreement or 0.0

    def error(self, proto: onnx.ModelProto) -> float:
        """Return ‖y - float‖ / ‖float‖ of the worst output."""
        (have,) = self._outputs(proto, self._few)
        pairs = ((y[: len(z)], z) for y, z in zip(self._want[0], have, strict=True))
        errors = [np.linalg.norm(z - y) / (np.linalg.norm(y) or 1.0) for y, z in pairs]
        return float(np.nan_to_num(np.max(errors), nan=np.inf))

    def _outputs(self, proto: onnx.ModelProto, batches: list[Batch]) -> list[list[Array]]:
        path = self._folder / "candidate.onnx"
        onnx.save(proto, str(path))
        run = runner_of(path)
        return [run(batch) for batch in batches]


def _first(batches: list[Batch], count: int) -> Iterator[Batch]:
    for batch in batches:
        if count > 0:
            yield tuple(x[:count] for x in batch)
        count -= len(batch[0])


def _choose(
    quantizer: _Quantizer, judge: _Judge, goal: float, progress: Progress
) -> tuple[KeptFloat, ...]:
    """Return what has to stay float so that the agreement on calibration inputs is `goal`.

    Raises:
        ParityError: not even with every second node in float.
    """
    if judge.agreement(quantizer.without(())) >= goal:
        return ()
    felt = []
    with progress.bar("sensitivity", len(quantizer.nodes)) as bar:
        for node in quantizer.nodes:
            felt.append(KeptFloat(node=node, error=judge.error(quantizer.only([node]))))
            bar.advance()
    felt.sort(key=lambda each: -each.error)

    def agreement(count: int) -> float:
        return judge.agreement(quantizer.without([each.node for each in felt[:count]]))

    most = len(felt) // 2
    count = bisect_left(range(most + 1), goal, lo=1, key=agreement)
    if count > most:
        raise ParityError(
            f"INT8 does not keep {goal:.2%} of the top-1 answers on calibration inputs, even with "
            f"{most} of {len(felt)} nodes in float; the worst is {felt[0].node}. {_WAY_OUT}"
        )
    return tuple(felt[:count])


def _proven(model: nn.Module, path: Path, batches: Iterable[Batch], progress: Progress) -> Parity:
    """Compare a file with the model; the first input goes alone, to prove batch 1 too."""
    run, gaps, seen = runner_of(path), Gaps(), 0
    with progress.bar("agreement", 1) as bar:
        for batch in batches:
            for part in batches_of(batch):
                ours = tuple(x.cpu() for x in part)
                gaps.add(arrays_of(model(*ours)), run(ours))
            seen += len(batch[0])
        bar.advance()
    return gaps.parity(seen)


def _require(found: Int8, agreement: float) -> None:
    parity, same = found.parity, found.parity.top1_agreement or 0.0
    if same < agreement or not np.isfinite(parity.max_relative):
        raise ParityError(
            f"INT8 and float agree on the top-1 answer of {same:.2%} of "
            f"{parity.inputs} inputs; {agreement:.2%} is asked. {_WAY_OUT}"
        )
