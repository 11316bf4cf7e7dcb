"""Where a model comes from and what was done to it: enough to build it again without pickle.

The lineage travels on the model itself, so it survives `copy.deepcopy` and is there when the model
is saved. Words only: this module knows nothing of torch.
"""

from typing import Any, Literal

from pydantic import Field

from nampruner.plan import PruningPlan, Record

_ATTRIBUTE = "_nampruner_lineage"

Value = bool | int | float | str | None
Literals = int | tuple[int, ...]


class NamSite(Record):
    """One NAM module: it follows `module` and is its child `nam`."""

    module: str
    parts: Literal["both", "channel", "spatial"]
    channels: int
    height: int
    width: int
    detach_weight: bool = False
    gain: float = 1.0


class AddedBias(Record):
    """A bias that recovery added to a layer after so many plans."""

    module: str
    after: int


class Lineage(Record):
    """The recipe of an architecture: source, NAM sites, widths changed since."""

    source: str | None = None
    """A model spec (`timm:resnet18`), or None for a model the caller built."""
    arguments: dict[str, Value] = Field(default_factory=dict)
    """What the source was called with: num_classes, in_channels, image_size."""
    nam: tuple[NamSite, ...] = ()
    baked: tuple[str, ...] = ()
    """Layers whose computed weight was made their parameter, see `nampruner.baking`."""
    attributes: dict[str, dict[str, Literals]] = Field(default_factory=dict)
    """Module → attribute → value, for every integer attribute that surgery changed."""
    biases: tuple[AddedBias, ...] = ()
    plans: tuple[PruningPlan, ...] = ()
    """Every plan applied so far, oldest first."""


def lineage(model: Any) -> Lineage:
    """Return the lineage `model` carries; an empty one where nobody recorded any."""
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, Lineage) else Lineage()


def remember(model: Any, **changes: Any) -> None:
    """Replace fields of the lineage that `model` carries."""
    setattr(model, _ATTRIBUTE, lineage(model).model_copy(update=changes))
