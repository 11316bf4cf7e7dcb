"""Width is a staircase: what a convolution of this width takes on this device, measured.

geometry.py  the convolutions of a network, and the same ones narrower
bench.py     their times in ONNX Runtime, float and INT8, in turns, kept in the user's cache
steps.py     the rounding step of each kind of layer, one for both
savings.py   what one step of width saves in a network
timetable.py the time of a network as a function of its widths
device.py    what a measured time depends on, and where it is kept
"""

from nampruner.staircase.bench import Bench, Clock, Turns
from nampruner.staircase.geometry import Geometry, Kind, layers_of
from nampruner.staircase.savings import GroupTime, savings
from nampruner.staircase.steps import Staircase, Stairs, module_steps, staircase
from nampruner.staircase.timetable import Timetable

__all__ = [
    "Bench",
    "Clock",
    "Geometry",
    "GroupTime",
    "Kind",
    "Staircase",
    "Stairs",
    "Timetable",
    "Turns",
    "layers_of",
    "module_steps",
    "savings",
    "staircase",
]
