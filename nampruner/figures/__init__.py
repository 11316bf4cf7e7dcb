"""Pictures from values: scale factors, widths, times, training; the only room with matplotlib.

Each function returns a `matplotlib.figure.Figure` whose title says what it shows. matplotlib is
imported when a figure is made, and pyplot never: no backend is chosen, no figure is kept alive.
"""

from nampruner.figures.factors import layer_histograms, scale_factor_histogram
from nampruner.figures.layers import layer_times, slowest
from nampruner.figures.network import recovered, training_curves, widths
from nampruner.figures.stairs import staircase
from nampruner.figures.style import save, svg

__all__ = [
    "layer_histograms",
    "layer_times",
    "recovered",
    "save",
    "scale_factor_histogram",
    "slowest",
    "staircase",
    "svg",
    "training_curves",
    "widths",
]
