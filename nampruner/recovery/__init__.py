"""What makes a cut harmless without training.

rows.py        what a consumer sees at sampled positions
fit.py         the least squares
refit.py       fit one consumer, by its outputs or by its inputs
survey.py      one look at a network: what follows what, what never changes
constants.py   fold constant channels, without data
walk.py        two passes through the whole network
"""

from nampruner.recovery.constants import fold_constants
from nampruner.recovery.walk import recover

__all__ = ["fold_constants", "recover"]
