"""What `nampruner.json` holds, and how it is read from anybody."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from nampruner.errors import CheckpointError
from nampruner.lineage import Lineage
from nampruner.plan import Certificate, Record

WEIGHTS = "model.safetensors"
RECORD = "nampruner.json"
Dtype = Literal["float16", "bfloat16", "float32", "float64"]
# lists of lists take some twenty times their JSON in memory
_LARGEST_RECORD_BYTES = 64 * 2**20


class InputSpec(Record):
    """What the network expects."""

    channels: int
    height: int
    width: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class Kept(Record):
    """What was done to parameters and buffers by name, and a fresh network would not have."""

    frozen: tuple[str, ...] = ()
    """Parameters without a gradient."""
    dtypes: dict[str, Dtype] = Field(default_factory=dict)
    """Those of another dtype than the record's."""
    channels_last: tuple[str, ...] = ()
    """Those laid out with the channels last."""
    tied: dict[str, str] = Field(default_factory=dict)
    """Further name of a shared tensor → its first one."""


class CheckpointRecord(Record):
    """`nampruner.json`."""

    format: Literal[1] = 1
    lineage: Lineage
    input: InputSpec | None = None
    data: str | None = None
    classes: tuple[str, ...] | None = None
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Options of the command that wrote it."""
    metrics: dict[str, float] = Field(default_factory=dict)
    certificate: Certificate | None = None
    """Of the last cut."""
    dtype: Dtype = "float32"
    """Of the parameters."""
    kept: Kept | None = None
    """None in a record from before it was written down."""
    versions: dict[str, str] = Field(default_factory=dict)
    parent: str | None = None
    """Checkpoint this one was made from."""


def read(folder: str | Path) -> CheckpointRecord:
    """Read `nampruner.json`.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no {RECORD}")
    if path.stat().st_size > _LARGEST_RECORD_BYTES:
        raise CheckpointError(f"{path} is too large to be a record of ours")
    try:
        return parse_record(path.read_text(encoding="utf-8"), str(path))
    except (UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); write the checkpoint again") from None


def parse_record(text: str, where: str) -> CheckpointRecord:
    """Read a record from JSON.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        return CheckpointRecord.model_validate_json(text)
    except (ValidationError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{where} is damaged ({first}); write the checkpoint again") from None
