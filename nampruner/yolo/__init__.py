"""Ultralytics' YOLO: NAM in, channels out, and a `.pt` that plain Ultralytics opens.

    import nampruner, nampruner.yolo as yolo

    model = yolo.load("best.pt")                                # or nampruner.build("yolo:…")
    data = yolo.images(model, "data.yaml")                      # letterboxed, no labels
    pruned = nampruner.prune(model, data[0], forward=yolo.forward, macs="50%", data=data)
    slim = yolo.train(pruned.model, "data.yaml", strength=0, epochs=25)
    yolo.save(slim.model, "slim.pt")                            # and YOLO("slim.pt") opens it
    nampruner.export_onnx(yolo.Exportable(slim.model), "slim.onnx", data[0])

Ultralytics is AGPL-3.0 and an optional extra: its API is called, in library.py.

network.py   the heads' outputs, export    row.py        NAM in a model YAML
picks.py     the boxes they come to        precision.py INT8, judged by mAP
source.py    networks from names           files.py      .pt files, the tripwire
images.py    letterboxed images            trainers.py   one per task, keeps the network
data.py      what a data set says          training.py   train, resume, validate
expectation.py  distances, for ONNX Runtime
"""

from collections.abc import Sequence

from torch import Tensor, nn

from nampruner import nam
from nampruner.lineage import NamSite
from nampruner.yolo.data import DataSet, read_data
from nampruner.yolo.files import describe_export, load, misfit, save
from nampruner.yolo.images import images, read_images
from nampruner.yolo.network import Exportable, channels_of, classes_of, forward
from nampruner.yolo.precision import Precision, export_int8
from nampruner.yolo.row import NAMRow, register
from nampruner.yolo.source import build, write_nam_yaml
from nampruner.yolo.trainers import Sparsity, trainer
from nampruner.yolo.training import (
    Trained,
    check_arguments,
    finished,
    fit,
    resume,
    train,
    validate,
)

__all__ = [
    "DataSet",
    "Exportable",
    "NAMRow",
    "Precision",
    "Sparsity",
    "Trained",
    "attach_nam",
    "build",
    "channels_of",
    "check_arguments",
    "classes_of",
    "describe_export",
    "export_int8",
    "finished",
    "fit",
    "forward",
    "images",
    "load",
    "misfit",
    "read_data",
    "read_images",
    "register",
    "resume",
    "save",
    "train",
    "trainer",
    "validate",
    "write_nam_yaml",
]

register()


def attach_nam(
    model: nn.Module, example_inputs: Tensor, *, at: Sequence[str] = (), detach_weight: bool = False
) -> tuple[NamSite, ...]:
    """Put channel NAM into a network that is built or trained, in place; no layer moves.

    At the end of every residual branch, or behind the modules that match `at`; see
    `nampruner.attach_nam`. Without the spatial part: its λ would fix the input size, which
    Ultralytics changes between training and validation.
    """
    return nam.attach_nam(
        model, example_inputs, parts="channel", at=at, detach_weight=detach_weight
    )
