"""Every option of nampruner, declared once.

A field here is the command-line flag, the recipe key, the entry in a saved JSON and the word in an
error message. A command takes one class; a class is put together from the groups it needs, so an
option has one name, one default, one range and one help text wherever it appears.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from nampruner.options import Options

Attention = Literal["both", "channel", "spatial", "none"]
PenaltyMethod = Literal["proximal", "subgradient"]
Importance = Literal["auto", "nam", "bn", "magnitude", "reconstruction", "taylor", "random"]
Allocation = Literal["global", "uniform", "error"]
Precision = Literal["no", "fp16", "bf16"]
Format = Literal["onnx", "pt2", "python"]
Kind = Literal[Format, "int8", "fp16"]
"""A format, or ONNX in fewer bits."""

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Amount = Annotated[str, Field(coerce_numbers_to_str=True)]


def _width(value: object) -> object:
    """One message where pydantic has one for every kind of value."""
    if value == "auto" or (str(value).isdigit() and int(str(value)) >= 1):
        return value
    raise ValueError("should be a whole number from 1 on, or auto")


RoundTo = Annotated[int | Literal["auto"], BeforeValidator(_width)]


class ModelOptions(Options):
    """Which network, and where NAM sits in it."""

    model: str = "resnet20"
    """resnet20, timm:NAME?key=value, torchvision:NAME, yolo:NAME, file.py:function or pkg:Class."""
    weights: Path | None = None
    """State dict to start from: a .safetensors, .pt or .pth file; without it, as built."""
    weights_strict: bool = True
    """Refuse --weights that do not fit; without it, what does not fit stays as built."""
    nam: Attention = "both"
    """Parts of NAM to attach: channel attention, spatial attention, both or none; yolo: channel."""
    nam_at: tuple[str, ...] = ()
    """Globs of modules NAM follows; without it, the end of every residual branch."""


class DataOptions(Options):
    """Which images, and how they arrive."""

    data: str = "mnist5k"
    """mnist5k, fashion-mnist, digits, class folders, timm's, a YOLO YAML or file.py:function."""
    image_size: Annotated[int, Field(ge=8)] | None = None
    """Height and width in pixels the network sees; without it, the data's own, for yolo 640."""
    batch_size: Positive = 128
    """Images per step."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes; 0 loads in the main process."""


class RuntimeOptions(Options):
    """Where and how reproducibly to compute."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, order, augmentation and splits."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


class OptimizerOptions(Options):
    """What sparse training and fine-tuning share."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD (Nesterov)."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay; scale factors and biases are left out."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the label spread over all classes."""
    precision: Precision = "no"
    """Mixed precision: no, fp16 or bf16."""


class TrainOptions(OptimizerOptions):
    """The sparse training."""

    epochs: Positive = 10
    """Passes over the training images."""
    lr: Annotated[float, Field(gt=0)] = 0.2
    """Peak learning rate of the one-cycle schedule."""


class YoloOptions(Options):
    """What only a network of Ultralytics takes."""

    yolo_args: tuple[str, ...] = ()
    """Further training arguments of Ultralytics, such as mosaic=0.5."""


class PenaltyOptions(Options):
    """The sparsity penalty p·Σ|γ| + p·Σ|λ|."""

    strength: Annotated[float, Field(ge=0)] | None = None
    """Coefficient p; by default a factor that no gradient holds falls from 1 to 0.2 in the run."""
    penalty: PenaltyMethod = "proximal"
    """proximal gives exact zeros, subgradient is the published form."""
    penalize_nam: bool = True
    """Put NAM's γ and λ under the penalty."""
    penalize_bn: bool = True
    """Put the host network's BN γ under the penalty."""
    penalty_warmup: Fraction = 0.1
    """Share of the steps over which the strength rises linearly from 0."""


class LatencyOptions(Options):
    """How time is measured."""

    threads: Positive = 1
    """Threads of ONNX Runtime while latency is measured."""


class SelectionOptions(Options):
    """Which channels go first, and which never."""

    importance: Importance = "auto"
    """Score that ranks the channels; auto is nam where NAM is attached, else bn."""
    allocation: Allocation = "global"
    """One ranking (global), one fraction for all layers (uniform) or cheapest first (error)."""
    round_to: RoundTo = 8
    """Kept widths are multiples of this; auto: of the steps of time, measured on this device."""
    floor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Smallest fraction of a layer that stays."""
    ignore: tuple[str, ...] = ()
    """Globs of layers to leave alone."""


TARGETS = ("ratio", "macs", "params", "latency", "memory")
ALONE = TARGETS[:-1]
"""Of these at most one can be given; memory is a limit beside it, or a target by itself."""


class PruneOptions(LatencyOptions, SelectionOptions):
    """How much to cut, and what."""

    ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Fraction of the prunable channels to remove, in [0, 1); `run` takes 0.3 without a target."""
    macs: Amount | None = None
    """MACs that may remain: 50%, 0.5 or 2.1G."""
    params: Amount | None = None
    """Parameters that may remain: 50%, 0.5 or 1.2M."""
    latency: Amount | None = None
    """Time of the exported network that may remain, as measured on this device: 60%, 0.6 or 5ms."""
    memory: Amount | None = None
    """Estimated peak of weights and activations at batch 1 that may remain: 60%, 0.6 or 20MB."""

    @model_validator(mode="before")
    @classmethod
    def _measured_steps(cls, values: Any) -> Any:
        """Whoever aims at time means the steps of time, unless a number is given."""
        if not isinstance(values, dict) or values.get("latency") is None:
            return values
        return {"round_to": "auto", **values}

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [name for name in ALONE if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were given together; give one target")
        return self


class CalibrationOptions(Options):
    """What may be looked at without labels."""

    calibration: Positive = 1024
    """Training images, without labels, for recovery, folded gates and INT8 ranges."""


class RecoveryOptions(CalibrationOptions):
    """What is done after the cut without training."""

    recover: bool = True
    """Recalibrate and fold after the cut."""
    allow_bias: bool = False
    """Let recovery add a bias where a layer has none and no BN follows."""


class FinetuneOptions(Options):
    """The training after the cut."""

    finetune_epochs: Annotated[int, Field(ge=0)] = 2
    """Passes over the training images after the cut; 0 skips fine-tuning."""
    finetune_lr: Annotated[float, Field(gt=0)] = 0.02
    """Peak learning rate of fine-tuning."""


class ExportOptions(Options):
    """The ONNX file and its proof."""

    parity_inputs: Positive = 64
    """Real inputs on which ONNX Runtime is compared with PyTorch."""
    tolerance: Annotated[float, Field(gt=0)] = 1e-4
    """Largest difference allowed, relative to the largest output."""
    fold_gates: Annotated[float, Field(gt=0, lt=1)] | None = None
    """NAM gates that could be constants at a relative error of at most this become constants."""


# pydantic lists the fields of the last base first: read these from right to left


class TrainCommand(
    RuntimeOptions, YoloOptions, PenaltyOptions, TrainOptions, DataOptions, ModelOptions
):
    """Everything `nampruner train` needs."""


class RankCommand(RuntimeOptions, LatencyOptions, DataOptions, SelectionOptions):
    """Everything `nampruner rank` needs beside the checkpoint."""

    # left out of what is merged into a recipe: it only adds a table
    latency: Annotated[bool, Field(exclude=True)] = False
    """Measure what one step of width saves in each layer, on this device."""


class PruneCommand(RuntimeOptions, DataOptions, RecoveryOptions, PruneOptions):
    """Everything `nampruner prune` needs beside the checkpoint."""

    # left out of what is merged into a recipe: the cut does not depend on it
    onnx: Annotated[Path | None, Field(exclude=True)] = None
    """Export the slim network there too, and time it against the dense one."""


class FinetuneCommand(RuntimeOptions, YoloOptions, DataOptions, OptimizerOptions, FinetuneOptions):
    """Everything `nampruner finetune` needs beside the checkpoint."""


class EvaluateCommand(RuntimeOptions, DataOptions):
    """Everything `nampruner evaluate` needs beside the checkpoint or ONNX file."""


class ExportCommand(RuntimeOptions, LatencyOptions, DataOptions, CalibrationOptions, ExportOptions):
    """Everything `nampruner export` needs beside the checkpoint."""

    # left out of what is merged into a recipe: `run` always writes float ONNX
    format: Annotated[Format, Field(exclude=True)] = "onnx"
    """onnx, pt2 (a torch.export program) or python (weights and a model.py without nampruner)."""
    int8: Annotated[bool, Field(exclude=True)] = False
    """ONNX in 8 bits, but for nodes where that costs too much; compared with its float file."""
    fp16: Annotated[bool, Field(exclude=True)] = False
    """ONNX in half precision, for GPUs; inputs and outputs stay float32."""
    agreement: Annotated[Fraction, Field(exclude=True)] = 0.99
    """Smallest share of test images to which --int8 gives the answer of the float network."""
    drop: Annotated[Fraction, Field(exclude=True)] = 0.01
    """Most mAP50-95 that --int8 may cost a detector; 0.01 is one point."""

    @property
    def kind(self) -> Kind:
        """What is written."""
        return "int8" if self.int8 else "fp16" if self.fp16 else self.format


class BenchCommand(LatencyOptions):
    """Everything `nampruner bench` needs beside the candidates."""

    batch: Positive = 1
    """Images per forward pass."""
    rounds: Positive = 20
    """Turns that every candidate gets."""
    per_layer: bool = False
    """Also tell where the time goes, layer by layer; profiled, on the CPU."""


class ReportCommand(RuntimeOptions, DataOptions, LatencyOptions, ExportOptions):
    """Everything `nampruner report` needs beside the checkpoint or run."""


class RunCommand(
    RuntimeOptions,
    ExportOptions,
    FinetuneOptions,
    RecoveryOptions,
    PruneOptions,
    YoloOptions,
    PenaltyOptions,
    TrainOptions,
    DataOptions,
    ModelOptions,
):
    """Everything `nampruner run` needs."""
