"""What is said of a network in INT8."""

from nampruner.plan import Latency, Parity, Record


class KeptFloat(Record):
    """A node of an INT8 network that stays float."""

    node: str
    """Module and operation, such as `fc/Gemm`."""
    error: float
    """‖y - float‖ / ‖float‖ of the outputs where this node alone is INT8, on calibration inputs."""


class Int8(Record):
    """An INT8 network against the float one."""

    parity: Parity
    """On the inputs of the proof; against PyTorch."""
    quantized: int
    """Nodes that are INT8."""
    kept_float: tuple[KeptFloat, ...]
    """The worst first; empty where all could be INT8."""
    calibration: int
    """Inputs that the ranges of the activations come from."""


class Int8Gain(Int8):
    """An INT8 network and what it brings, in ONNX Runtime, against its float file."""

    size_float: int
    accuracy_float: float | None
    """On the test images."""
    accuracy: float | None
    metrics_float: dict[str, float]
    """What else is measured there: mAP50, mAP50-95 …"""
    metrics: dict[str, float]
    latency_float: Latency
    latency: Latency
    """Both timed in turns."""
    faster: bool
    verdict: str
