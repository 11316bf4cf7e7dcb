"""What makes a cut harmless without training.

rows.py        what a consumer sees at sampled positions
fit.py         the least squares
refit.py       fit one consumer, by its outputs or by its inputs
norms.py       the statistics of BN layers
survey.py      one look at a network: what follows what, what never changes
constants.py   fold constant channels, without data
walk.py        two passes through the whole network, and more images for the statistics
verdicts.py    what becomes of each unit that was removed
"""

from nampruner.recovery.constants import fold_constants
from nampruner.recovery.verdicts import Findings, judged
from nampruner.recovery.walk import find, recover

__all__ = ["Findings", "find", "fold_constants", "judged", "recover"]
