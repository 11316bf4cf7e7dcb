"""All that is used of Ultralytics (AGPL-3.0); no other file of nampruner imports it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from PIL import Image

from nampruner.errors import NamPrunerError

_THEIRS = {"open": Image.open}, {"save": torch.save}
"""What importing Ultralytics replaces for the whole process; nobody who imports us asked for it."""

try:
    from ultralytics.data.augment import LetterBox, classify_transforms
    from ultralytics.data.loaders import LoadImagesAndVideos
    from ultralytics.data.utils import check_cls_dataset, check_det_dataset
    from ultralytics.models.yolo.classify import ClassificationTrainer, ClassificationValidator
    from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
    from ultralytics.models.yolo.obb import OBBTrainer, OBBValidator
    from ultralytics.models.yolo.pose import PoseTrainer, PoseValidator
    from ultralytics.models.yolo.segment import SegmentationTrainer, SegmentationValidator
    from ultralytics.nn import tasks
    from ultralytics.nn.modules.block import DFL
    from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, ROOT, YAML
    from ultralytics.utils.nms import non_max_suppression
    from ultralytics.utils.torch_utils import is_qat, unwrap_model
except ImportError as error:
    raise NamPrunerError(
        f"YOLO models need Ultralytics, which cannot be imported ({error}); install the extra: "
        "pip install 'nampruner[yolo]' (Ultralytics is AGPL-3.0)"
    ) from error
finally:
    vars(Image).update(_THEIRS[0])
    vars(torch).update(_THEIRS[1])

__all__ = [
    "DEFAULT_CFG_DICT",
    "DFL",
    "ROOT",
    "YAML",
    "ClassificationTrainer",
    "ClassificationValidator",
    "DetectionTrainer",
    "DetectionValidator",
    "LetterBox",
    "LoadImagesAndVideos",
    "OBBTrainer",
    "OBBValidator",
    "PoseTrainer",
    "PoseValidator",
    "SegmentationTrainer",
    "SegmentationValidator",
    "check_cls_dataset",
    "check_det_dataset",
    "classify_transforms",
    "is_qat",
    "non_max_suppression",
    "quiet",
    "tasks",
    "unwrap_model",
]


@contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Keep Ultralytics from printing, its errors apart."""
    before = LOGGER.level
    LOGGER.setLevel(before if verbose else logging.ERROR)
    try:
        yield
    finally:
        LOGGER.setLevel(before)
