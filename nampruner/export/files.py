"""An export appears under its name only when it is right; and what it says of itself."""

import logging
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from json import JSONDecodeError, dumps, loads
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from nampruner.errors import NamPrunerError
from nampruner.latency import open_session

WEIGHTS = "model.safetensors"
METADATA = "nampruner.json"
"""Entry of a `.pt2` or weights file that holds our metadata."""


@contextmanager
def published(path: Path, suffix: str) -> Iterator[Path]:
    """Give a draft name beside `path`; the file gets its own name when the block ends well.

    Raises:
        NamPrunerError: `path` is a folder.
    """
    if path.is_dir():
        raise NamPrunerError(f"{path} is a folder; give the name of a file, such as model{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' deprecations and dumps to themselves: the user hears it from us."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def not_exported(model: nn.Module, cause: str) -> NamPrunerError:
    """Say that a network cannot be traced, with the first line of the exporter's reason."""
    return NamPrunerError(
        f"{type(model).__name__} cannot be exported with a free batch size: "
        f"{(cause.strip() or 'no reason given').splitlines()[0]}; "
        "its forward must not depend on values or on the number of inputs"
    )


def read_metadata(path: Path | str) -> dict[str, str]:
    """Return what an export says of itself, key → text: an ONNX file, a `.pt2` or a folder.

    Raises:
        NamPrunerError: it is missing, damaged, or no export.
    """
    path = Path(path)
    if path.is_dir():
        return _of_weights(path / WEIGHTS)
    if zipfile.is_zipfile(path):
        return _of_archive(path)
    return dict(open_session(path).get_modelmeta().custom_metadata_map)


def packed(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return metadata as the one entry that a `.pt2` or weights file holds of it."""
    return {METADATA: dumps(dict(metadata or {}))}


def _unpacked(text: str | bytes, path: Path) -> dict[str, str]:
    try:
        return {str(key): str(value) for key, value in loads(text).items()}
    except (JSONDecodeError, UnicodeDecodeError, AttributeError, RecursionError):
        raise _foreign(path) from None


def _of_weights(path: Path) -> dict[str, str]:
    try:
        with safe_open(str(path), framework="pt") as file:
            found = dict(file.metadata() or {})
    except (SafetensorError, OSError):
        raise _foreign(path.parent) from None
    return _unpacked(found.get(METADATA, ""), path.parent)


def _of_archive(path: Path) -> dict[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            ours = [name for name in archive.namelist() if name.endswith(f"/{METADATA}")]
            text = archive.read(ours[0]) if ours else ""
    except (OSError, zipfile.BadZipFile):
        raise _foreign(path) from None
    return _unpacked(text, path)


def _foreign(path: Path) -> NamPrunerError:
    return NamPrunerError(f"{path} is damaged, or no export of nampruner; export again")
