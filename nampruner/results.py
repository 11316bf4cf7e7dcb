"""What a command says that it did: the before/after table as values."""

from pydantic import Field

from nampruner.plan import (
    Achieved,
    Certificate,
    FoldedGates,
    Latency,
    LeftAlone,
    Parity,
    Record,
    Request,
)


class Quality(Record):
    """How good a network is on images that it was not trained on."""

    accuracy: float | None = None
    """Share of the images classified right, in [0, 1]; None where that is not what is asked."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """What else is measured, in [0, 1]: mAP50, mAP50-95 …"""

    @property
    def measures(self) -> dict[str, float]:
        """Everything measured, by its name."""
        own = {} if self.accuracy is None else {"accuracy": self.accuracy}
        return own | self.metrics


class Measured(Quality):
    """One column of the before/after table."""

    params: int
    macs: int
    memory: int | None = None
    """Bytes, see `Size`."""
    size_bytes: int | None = None
    """Size of the ONNX file."""
    latency: Latency | None = None


class PruneResult(Record):
    """What `nampruner prune` reports."""

    requested: Request
    achieved: Achieved
    before: Measured
    after: Measured
    certificate: Certificate
    left_alone: tuple[LeftAlone, ...]
    checkpoint: str | None = None
    faster: bool | None = None
    """Whether the slim ONNX file is, beyond the noise; None where it was not timed."""


class OnnxResult(Record):
    """The exported file, its proof and its speed."""

    path: str
    parity: Parity
    latency_ms: dict[str, float]
    """Median per candidate: `dense` and `slim`."""
    folded: FoldedGates | None = None
    """Only where gates were made constant."""


class RunResult(PruneResult):
    """What `nampruner run` reports; its accuracy after fine-tuning is `after.accuracy`."""

    accuracy_cut: float | None = None
    """Right after the cut, before recovery."""
    metrics_cut: dict[str, float] = Field(default_factory=dict)
    """What else was measured there."""
    accuracy_recovered: float | None = None
    """After recovery, before fine-tuning."""
    metrics_recovered: dict[str, float] = Field(default_factory=dict)
    """What else was measured there."""
    onnx: OnnxResult

    @property
    def cut(self) -> Quality:
        """Right after the cut."""
        return Quality(accuracy=self.accuracy_cut, metrics=self.metrics_cut)

    @property
    def recovered(self) -> Quality:
        """After recovery."""
        return Quality(accuracy=self.accuracy_recovered, metrics=self.metrics_recovered)
