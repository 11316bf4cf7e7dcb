"""Values as Python source: what comes from a checkpoint is data there, and never becomes code."""

import json
import math
from collections.abc import Iterable
from keyword import iskeyword
from typing import Any

from nampruner.errors import NamPrunerError

_PLAIN = (bool, int, str, type(None))


def is_literal(value: object) -> bool:
    """Say whether `value` is plain data that can be written down: numbers, text, and lists of it.

    Subclasses (named tuples, enumerations) are not: they would come back as something else.
    """
    if type(value) in (list, tuple):
        return all(is_literal(part) for part in value)  # type: ignore[attr-defined]
    if type(value) is dict:
        return all(is_literal(part) for item in value.items() for part in item)
    if type(value) is slice:
        return is_literal((value.start, value.stop, value.step))
    return type(value) in _PLAIN or (type(value) is float and math.isfinite(value))


def literal(value: Any) -> str:
    """Write plain data as Python source.

    Raises:
        NamPrunerError: it is no plain data.
    """
    if not is_literal(value):
        raise NamPrunerError(f"{value!r} cannot be written as Python; export onnx or pt2")
    if type(value) is str:
        return json.dumps(value, ensure_ascii=False)
    if type(value) is list:
        return f"[{_joined(value)}]"
    if type(value) is tuple:
        return f"({_joined(value)}{',' if len(value) == 1 else ''})"
    if type(value) is dict:
        return f"{{{', '.join(f'{literal(k)}: {literal(v)}' for k, v in value.items())}}}"
    return repr(value)


def _joined(values: Iterable[Any]) -> str:
    return ", ".join(literal(value) for value in values)


def call_of(function: str, /, *values: Any, **named: Any) -> str:
    """Write a call of `function`, a dotted name, with plain arguments.

    Raises:
        NamPrunerError: a name is none, or an argument is no plain data.
    """
    for name in (*function.split("."), *named):
        if not name.isidentifier() or iskeyword(name):
            raise NamPrunerError(f"{name!r} is no name in Python; export onnx or pt2")
    arguments = [literal(value) for value in values]
    arguments += [f"{name}={literal(value)}" for name, value in named.items()]
    return f"{function}({', '.join(arguments)})"
