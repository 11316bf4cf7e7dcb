"""What a measured time depends on, and where it is kept."""

import hashlib
import os
import platform
import sys
from pathlib import Path

_FLAGS = ("flags", "Features")
"""How x86 and Arm call the line of /proc/cpuinfo that lists the instruction sets."""


def processor() -> str:
    """Return the name of the processor."""
    return _listed(("model name",)) or platform.processor() or platform.machine()


def fingerprint(*more: str) -> str:
    """Return a hash of the processor, its instruction sets and `more` that times depend on."""
    known = (processor(), _listed(_FLAGS), platform.machine(), *more)
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]


def _listed(names: tuple[str, ...]) -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in names:
                return value.strip()
    return ""


def cache_folder() -> Path:
    """Return nampruner's folder in the user's cache: $XDG_CACHE_HOME or what stands for it."""
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given) / "nampruner"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "nampruner" / "Cache"
    caches = "Library/Caches" if sys.platform == "darwin" else ".cache"
    return Path.home() / caches / "nampruner"
