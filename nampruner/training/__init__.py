"""One training loop for sparse training and fine-tuning, one evaluation loop."""

from nampruner.training.evaluation import check_match, evaluate
from nampruner.training.loop import fit
from nampruner.training.surroundings import resolve_device
from nampruner.training.values import EpochMetrics, Evaluation, FitSettings, History

__all__ = [
    "EpochMetrics",
    "Evaluation",
    "FitSettings",
    "History",
    "check_match",
    "evaluate",
    "fit",
    "resolve_device",
]
