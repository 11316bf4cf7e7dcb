"""The values that pass between the rooms: a plan, what it costs, and what certifies it.

All are frozen, JSON, and know nothing of torch. Index lists are sorted and unique.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """A frozen value with a JSON form."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Return itself, as nobody changes it: a plan holds thousands of indices."""
        return self


class Request(Record):
    """What the user asked for: one of the targets, memory beside it or alone."""

    ratio: float | None = None
    """Fraction of the prunable channels to remove."""
    macs: str | None = None
    """MACs that may remain, as a fraction (`50%`, `0.5`) or absolute (`2.1G`)."""
    params: str | None = None
    """Parameters that may remain, likewise."""
    latency: str | None = None
    """Measured time that may remain, as a fraction or absolute (`5ms`)."""
    memory: str | None = None
    """Bytes that may remain, as a fraction or absolute (`20MB`): alone, or beside another target
    as what must hold as well."""


class Achieved(Record):
    """What came out after rounding and floors."""

    ratio: float
    """Fraction of the prunable channels removed."""
    macs: float
    """Fraction of the MACs that remains."""
    params: float
    """Fraction of the parameters that remains."""
    memory: float | None = None
    """Fraction of the memory that remains; None in older plans."""
    latency: float | None = None
    """Fraction of the time that remains, measured on the exported network; None where it was not
    aimed at."""


class Size(Record):
    """How large a network is."""

    params: int
    """Elements of all parameters."""
    macs: int
    """Multiply–accumulates of one forward pass at batch 1."""
    memory: int | None = None
    """Bytes: all parameters, and the most that lives beside them in one forward pass at batch 1, an
    estimate by the order of its ops, see `nampruner.graph.memory`; None in older plans."""


class LayerPlan(Record):
    """What happens to one group of channels, named after the first layer that produces it."""

    layer: str
    width_before: int
    width_after: int
    threshold: float | None = None
    """Smallest importance that stays, or None where nothing is removed."""


class LeftAlone(Record):
    """A layer that keeps its width, and why."""

    layer: str
    reason: str


class Repair(Record):
    """An attribute that carried a width as a literal, and its new value."""

    module: str
    attribute: str
    before: int | tuple[int, ...]
    after: int | tuple[int, ...]


Verdict = Literal["exact", "bounded", "lossy"]


class LayerRecovery(Record):
    """How well one consumer's removed inputs are re-expressed by what stays."""

    layer: str
    removed: int
    """Input channels removed from this consumer."""
    explained: Annotated[float, Field(le=1.0)] | None
    """Share of the variance of what was removed that recovery gives back; None without data."""
    method: Literal["taps", "affine", "constant", "none"]
    """What was used.

    - taps: a fit of its outputs, tap by tap; right at zero-padded borders too.
    - affine: a fit of its inputs, one map for all taps; right where no padding is touched.
    - constant: nothing that was removed ever varied; a constant stands for it.
    - none: it keeps its cut weight, as it runs twice or is too wide to fit.
    """
    border: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of its output positions whose window touches zero padding."""
    verdict: Verdict = "lossy"
    """Held-out outputs (affine: inputs) off by at most 1e-5, at most 0.1, or more."""
    bound: float | None = None
    """Largest error on held-out positions, in standard deviations; None where none was fitted."""
    units: dict[Verdict, int] = Field(default_factory=dict)
    """The same of each removed input: how far what stays predicts it."""


class UnitVerdicts(Record):
    """What becomes of the removed units of one group, by their index in the layer that makes them.

    A unit's verdict is the worst of all its consumers. Each is asked how well the original's
    channels that stay predict the one that goes, zeros of the padding included, on positions not
    used in the fit, in standard deviations of the channel. (A grouped consumer answers for its
    outputs instead.) Where all units are exact, so is the recovered network.
    """

    layer: str
    exact: tuple[int, ...] = ()
    """Constant and folded, or predicted to rounding: off by at most 1e-5, or read by nobody."""
    bounded: dict[int, float] = Field(default_factory=dict)
    """Off by at most this bound, which is at most 0.1."""
    lossy: tuple[int, ...] = ()
    """Off by more, or nobody can say: no data, or a consumer that cannot be fitted."""


class Certificate(Record):
    """Proof that the surgery is exact, and what the cut costs."""

    max_relative_error: float
    """Largest |masked - pruned| over the largest |masked|, worst output."""
    inputs: int
    """Inputs on which it was computed."""
    dtype: Literal["float64"] = "float64"
    output_error_cut: float | None = None
    """‖slim - dense‖ / ‖dense‖ on calibration inputs right after the cut."""
    output_error_recovered: float | None = None
    """The same after recovery."""
    top1_agreement_cut: float | None = None
    top1_agreement_recovered: float | None = None
    layers: tuple[LayerRecovery, ...] = ()
    verdicts: dict[Verdict, int] = Field(default_factory=dict)
    """How many of the removed units are exact, bounded and lossy, see `UnitVerdicts`."""
    units: tuple[UnitVerdicts, ...] = ()
    """The same unit by unit, one row per group of channels that lost any."""


class FoldedGate(Record):
    """One part of NAM at export: how far its gate is from a constant on calibration inputs."""

    module: str
    error: float
    """‖y - k·x‖ / ‖y‖ with the best constant k per channel."""
    constant: bool
    """Whether it became that constant, in the layer before it."""


class FoldedGates(Record):
    """What it cost to make constants of the gates that hardly move."""

    bound: float
    """Largest error of a gate that was allowed."""
    gates: tuple[FoldedGate, ...]
    output_error: float
    """‖folded - as it was‖ / ‖as it was‖ of the network's outputs on the inputs of the proof."""
    top1_agreement: float


class BoxParity(Record):
    """The boxes of a detector in two runtimes, after suppression, on the same images."""

    boxes: int
    """What PyTorch finds, at a score of 0.05 or more; of a network that picks by itself, all."""
    pairs: int
    """What both find: of one class, in one place."""
    ties: int
    """What only one finds."""
    worst_iou: float
    """Smallest intersection over union of a pair."""
    worst_shift: float
    """Largest difference of a pair's coordinates in pixels."""
    worst_score: float
    """Largest difference of a pair's scores."""
    worst_tie: float
    """How far a score would have had to be another one for both to find the same."""


class Parity(Record):
    """ONNX Runtime against PyTorch on real inputs."""

    max_abs: float
    max_relative: float
    """Largest absolute difference over the largest |output|."""
    top1_agreement: float | None
    """Of the first output over its dimension 1; None where that is no score."""
    inputs: int
    boxes: BoxParity | None = None
    """Only of a detector."""


class Latency(Record):
    """Measured time of one forward pass."""

    median_ms: float
    spread_ms: float
    """Of single runs: half of the distance between the 10th and the 90th percentile."""
    turns_ms: tuple[float, ...] = ()
    """The median of each turn; what one measurement times takes its turns side by side."""
    runs: int
    threads: int
    batch: int
    runtime: str
    """For example `onnxruntime 1.32.0 CPUExecutionProvider`."""


class PruningPlan(Record):
    """Which channels go, decided before anything is cut."""

    format: Literal[1] = 1
    importance: str
    allocation: str
    round_to: int | Literal["auto"]
    requested: Request
    achieved: Achieved
    before: Size
    after: Size
    layers: tuple[LayerPlan, ...]
    left_alone: tuple[LeftAlone, ...]
    removed: dict[str, dict[int, list[int]]]
    """Parameter or buffer name → dimension → indices that go."""
    masked: dict[str, dict[int, list[int]]]
    """The part of `removed` that consumes: zeroing it makes the masked network."""
    repairs: tuple[Repair, ...] = ()
    baked: tuple[str, ...] = ()
    """Layers whose computed weight becomes their parameter first, see `nampruner.baking`."""
    certificate: Certificate | None = None
    """What became of the plan, in the `plan.json` of a run."""

    def __str__(self) -> str:
        lines = [f"{'layer':<40} {'width':>13}  threshold"]
        for row in self.layers:
            widths = f"{row.width_before} → {row.width_after}"
            threshold = "" if row.threshold is None else f"{row.threshold:.4g}"
            lines.append(f"{row.layer:<40} {widths:>13}  {threshold}")
        lines += [f"{row.layer:<40} left alone: {row.reason}" for row in self.left_alone]
        asked: Any = self.requested.model_dump(exclude_none=True)
        lines.append(
            f"requested {asked}, achieved ratio {self.achieved.ratio:.3f}, "
            f"MACs {self.achieved.macs:.1%}, params {self.achieved.params:.1%} of before"
            + ("" if self.achieved.memory is None else f", memory {self.achieved.memory:.1%}")
        )
        return "\n".join(lines)
