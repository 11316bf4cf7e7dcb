"""What makes a cut harmless without training.

`rows` says what a consumer sees, `fit` is the least squares, `walk` takes them through the network.
"""

from nampruner.recovery.walk import recover

__all__ = ["recover"]
