"""Measured latency: the only clock of nampruner, and the only place that opens ONNX Runtime.

Candidates are timed in turns (A B A B …), so a machine that slows down slows all of them, and a
number is the median of many runs beside its spread. Whether one is faster than another is decided
by `compare`, which calls a difference inside the noise by that name.

sessions.py  open an ONNX file, name its inputs
clock.py     time candidates in turns
verdict.py   which of two is faster
profile.py   where the time goes, layer by layer
"""

from nampruner.latency.clock import Candidate, device_of, evaluating, measure, summarize
from nampruner.latency.profile import Profile, by_layer, profile
from nampruner.latency.sessions import VERSION, Array, feeds, open_session
from nampruner.latency.verdict import Verdict, compare

__all__ = [
    "VERSION",
    "Array",
    "Candidate",
    "Profile",
    "Verdict",
    "by_layer",
    "compare",
    "device_of",
    "evaluating",
    "feeds",
    "measure",
    "open_session",
    "profile",
    "summarize",
]
