"""nampruner: train with NAM, read the scale factors, prune exactly, recover, export.

The table of contents; a name is imported when it is first used, so `import nampruner` is light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nampruner.certificate import certify as certify
    from nampruner.checkpoint import load as load
    from nampruner.checkpoint import save as save
    from nampruner.data import Data as Data
    from nampruner.data import load_data as load_data
    from nampruner.errors import CertificateError as CertificateError
    from nampruner.errors import CheckpointError as CheckpointError
    from nampruner.errors import GraphError as GraphError
    from nampruner.errors import NamPrunerError as NamPrunerError
    from nampruner.errors import NoEffectWarning as NoEffectWarning
    from nampruner.errors import ParityError as ParityError
    from nampruner.export import export_fp16 as export_fp16
    from nampruner.export import export_int8 as export_int8
    from nampruner.export import export_onnx as export_onnx
    from nampruner.export import export_pt2 as export_pt2
    from nampruner.export import export_python as export_python
    from nampruner.graph import DependencyGraph as DependencyGraph
    from nampruner.graph import channelwise as channelwise
    from nampruner.graph import rule as rule
    from nampruner.graph import trace as trace
    from nampruner.importance import score as score
    from nampruner.latency import measure as measure
    from nampruner.models import build as build
    from nampruner.nam import NAM as NAM
    from nampruner.nam import attach_nam as attach_nam
    from nampruner.nam import fold_nam as fold_nam
    from nampruner.nam import resample_nam as resample_nam
    from nampruner.penalty import SparsityPenalty as SparsityPenalty
    from nampruner.plan import Certificate as Certificate
    from nampruner.plan import PruningPlan as PruningPlan
    from nampruner.pruning import plan_pruning as plan_pruning
    from nampruner.pruning import prune as prune
    from nampruner.recovery import recover as recover
    from nampruner.surgery import cut as cut
    from nampruner.training import FitSettings as FitSettings
    from nampruner.training import evaluate as evaluate
    from nampruner.training import fit as fit

_CONTENTS: dict[str, str] = {
    # prune a model of your own
    "trace": "nampruner.graph",
    "channelwise": "nampruner.graph",
    "rule": "nampruner.graph",
    "DependencyGraph": "nampruner.graph",
    "score": "nampruner.importance",
    "plan_pruning": "nampruner.pruning",
    "PruningPlan": "nampruner.plan",
    "cut": "nampruner.surgery",
    "certify": "nampruner.certificate",
    "Certificate": "nampruner.plan",
    "recover": "nampruner.recovery",
    "prune": "nampruner.pruning",
    # train with NAM under the penalty
    "NAM": "nampruner.nam",
    "attach_nam": "nampruner.nam",
    "resample_nam": "nampruner.nam",
    "SparsityPenalty": "nampruner.penalty",
    "build": "nampruner.models",
    "Data": "nampruner.data",
    "load_data": "nampruner.data",
    "FitSettings": "nampruner.training",
    "fit": "nampruner.training",
    "evaluate": "nampruner.training",
    # keep and ship
    "save": "nampruner.checkpoint",
    "load": "nampruner.checkpoint",
    "fold_nam": "nampruner.nam",
    "export_onnx": "nampruner.export",
    "export_int8": "nampruner.export",
    "export_fp16": "nampruner.export",
    "export_pt2": "nampruner.export",
    "export_python": "nampruner.export",
    "measure": "nampruner.latency",
    # errors
    "NamPrunerError": "nampruner.errors",
    "GraphError": "nampruner.errors",
    "CertificateError": "nampruner.errors",
    "CheckpointError": "nampruner.errors",
    "ParityError": "nampruner.errors",
    "NoEffectWarning": "nampruner.errors",
}

__all__ = sorted(_CONTENTS)


def __getattr__(name: str) -> Any:
    if name not in _CONTENTS:
        raise AttributeError(f"module 'nampruner' has no attribute {name!r}")
    return getattr(import_module(_CONTENTS[name]), name)


def __dir__() -> list[str]:
    return __all__
