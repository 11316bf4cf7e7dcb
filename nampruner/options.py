"""A group of options, and what is said of a wrong one."""

from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from nampruner.errors import NamPrunerError, did_you_mean


class Options(BaseModel):
    """A frozen group of options; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


T = TypeVar("T", bound=Options)


def parse(cls: type[T], values: dict[str, Any], source: str) -> T:
    """Build `cls` from plain values, with all mistakes in one message.

    Raises:
        NamPrunerError: a key is unknown or a value is out of range; `source` says where.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise NamPrunerError(f"{source}: {explain(error, cls.model_fields)}") from None


def explain(error: ValidationError, known: Iterable[str], *, flags: bool = False) -> str:
    """Say everything that is wrong in one line, by flag (`--round-to`) or by key (`round_to`)."""
    known = list(known)
    return "; ".join(_explain(item, known, flags) for item in error.errors())


def _explain(item: Any, known: list[str], flags: bool) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"unknown option {key!r}.{did_you_mean(key, known)}"
    message: str = item["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if not key:
        return message
    name = flag(key) if flags else key
    return f"{name} = {item['input']!r}: {message}"


def flag(key: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + key.replace("_", "-")
