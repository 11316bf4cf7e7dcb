"""The NAM room: the module, where residual branches end, and how NAM gets there.

module.py    channel and spatial attention from BN scale factors (the paper)
branches.py  run a network once and see which module ends each residual branch
attach.py    put NAM behind those modules, again after loading, and for another input size
fold.py      what is left of it at inference
"""

from nampruner.nam.attach import attach_nam, attach_sites, resample_nam
from nampruner.nam.fold import Folded, fold_nam
from nampruner.nam.module import (
    NAM,
    ChannelNAM,
    Parts,
    SpatialNAM,
    attention_weight,
    nam_modules,
)

__all__ = [
    "NAM",
    "ChannelNAM",
    "Folded",
    "Parts",
    "SpatialNAM",
    "attach_nam",
    "attach_sites",
    "attention_weight",
    "fold_nam",
    "nam_modules",
    "resample_nam",
]
