"""Results to stdout, all else to stderr; the only place that prints."""

import os
import sys

from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.text import Text

_WIDTH_OF_A_FILE = 120


def console(*, stderr: bool = False) -> Console:
    """Return a console; what goes into a file is not folded at 80 characters."""
    stream = sys.stderr if stderr else sys.stdout
    free = not stream.isatty() and "COLUMNS" not in os.environ
    return Console(stderr=stderr, width=_WIDTH_OF_A_FILE if free else None, highlight=False)


def show(value: BaseModel, *views: RenderableType, as_json: bool) -> None:
    """Print a result: as tables, or as one JSON object that leaves out what was not measured."""
    if as_json:
        sys.stdout.write(value.model_dump_json(indent=2, exclude_none=True) + "\n")
        return
    out = console()
    for view in views:
        out.print(view)


def complain(message: str) -> None:
    """Print what the user can put right."""
    console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def tell(message: str) -> None:
    """Print one line beside the results."""
    console(stderr=True).print(Text(message), soft_wrap=True)
