"""How values look in a terminal, and who draws the bars: results to stdout, all else to stderr.

streams.py  print: a result, a mistake, a line
bars.py     how far long work is
tables.py   values as tables
"""

from nampruner.console.bars import progress
from nampruner.console.streams import complain, show, tell
from nampruner.console.tables import (
    before_after,
    benchmark,
    evaluated,
    exported,
    made,
    plan_table,
    ranking,
)

__all__ = [
    "before_after",
    "benchmark",
    "complain",
    "evaluated",
    "exported",
    "made",
    "plan_table",
    "progress",
    "ranking",
    "show",
    "tell",
]
