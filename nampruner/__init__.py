"""nampruner: train with NAM, read the scale factors, prune exactly, recover, export.

The table of contents; a name is imported when it is first used, so `import nampruner` is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

_CONTENTS: dict[str, str] = {}

__all__ = sorted(_CONTENTS)


def __getattr__(name: str) -> Any:
    if name not in _CONTENTS:
        raise AttributeError(f"module 'nampruner' has no attribute {name!r}")
    return getattr(import_module(_CONTENTS[name]), name)
