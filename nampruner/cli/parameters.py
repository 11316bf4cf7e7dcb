"""Parameters that several commands have, and how their help looks."""

from itertools import count
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

FLAT = Parameter(name="*")
ORDER = count()
"""Help lists the commands as they stand in the file."""
Out = Annotated[Path | None, Parameter(help="Where the result goes.")]
Checkpoint = Annotated[Path, Parameter(help="Folder of a checkpoint, or YOLO's .pt.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object.")]
Trust = Annotated[
    bool,
    Parameter(negative="", help="Run the code that a checkpoint or recipe names as its source."),
]
AllowSlower = Annotated[
    bool, Parameter(negative="", help="Exit with 0 even where the slim network is not faster.")
]


def examples(*lines: str) -> str:
    """Return real command lines as the end of a help page."""
    return "\n".join(["Examples:", "", "```", *lines, "```"])
