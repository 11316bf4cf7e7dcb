"""The boxes that two runtimes find: the same, a tie of scores, or something else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boxes import SIZE, TINY
from torch import Tensor, nn
from zoo import lively

import nampruner
from nampruner import yolo
from nampruner.errors import ParityError
from nampruner.export import parity
from nampruner.export.boxes import BoxGaps, require_boxes
from nampruner.latency import Array
from nampruner.plan import BoxParity, Parity
from nampruner.progress import Silent

FOUND = np.array(
    [
        [10, 10, 30, 30, 0.9, 0],
        [11, 10, 31, 30, 0.8, 1],
        [40, 40, 60, 60, 0.5, 0],
    ],
    dtype=np.float32,
)


def gaps(want: Array, have: Array, *, thresholded: bool = True) -> BoxParity:
    found = BoxGaps(thresholded=thresholded)
    found.add(want, have)
    return found.parity()


def changed(row: int, column: int, value: float) -> Array:
    other = FOUND.copy()
    other[row, column] += value
    return other[::-1].copy()


def test_the_same_boxes_are_paired_in_any_order() -> None:
    found = gaps(FOUND, FOUND[[2, 0, 1]])
    assert (found.boxes, found.pairs, found.ties) == (3, 3, 0)
    assert (found.worst_iou, found.worst_shift, found.worst_score) == (1.0, 0.0, 0.0)
    require_boxes(found, 1e-4, "it")
    assert gaps(FOUND[:0], FOUND[:0]).boxes == 0


def test_how_far_they_are_apart_is_told() -> None:
    moved = gaps(FOUND, changed(2, 0, 0.5))
    assert moved.worst_shift == 0.5
    assert moved.worst_iou == pytest.approx(19.5 / 20)
    scored = gaps(FOUND, changed(2, 4, 0.01))
    assert scored.worst_score == pytest.approx(0.01)
    for found in (moved, scored):
        with pytest.raises(ParityError, match="find other boxes: of 3, 3 are the same"):
            require_boxes(found, 1e-4, "it")
        require_boxes(found, 1e-2, "it")  # half precision may


def test_a_missing_box_is_a_difference_and_a_tie_is_none() -> None:
    lost = gaps(FOUND, FOUND[:2])
    assert (lost.pairs, lost.ties) == (2, 1)
    assert lost.worst_tie == pytest.approx(0.45)  # of 0.5 it would have to fall below 0.05
    with pytest.raises(ParityError, match="1 have no counterpart"):
        require_boxes(lost, 1e-4, "it")

    faint = FOUND.copy()
    faint[2, 4] = 0.0501
    require_boxes(gaps(faint, faint[:2]), 1e-4, "it")

    # of two that overlap, each side keeps another one
    rivals = np.array([[10, 10, 30, 30, 0.7001, 0], [14, 10, 34, 30, 0.7, 0]], np.float32)
    tie = gaps(rivals[:1], rivals[1:])
    assert (tie.pairs, tie.ties) == (0, 2)
    require_boxes(tie, 1e-4, "it")
    rivals[1, 4] = 0.6
    with pytest.raises(ParityError, match="find other boxes"):
        require_boxes(gaps(rivals[:1], rivals[1:]), 1e-4, "it")


def test_everything_cannot_be_a_tie() -> None:
    other = np.tile(FOUND, (4, 1)) + np.arange(12)[:, None] * [70, 0, 70, 0, 0, 0]
    moved = other + np.array([6, 0, 6, 0, 0, 0])
    found = gaps(other, moved)
    assert found.worst_tie == 0.0
    with pytest.raises(ParityError, match="find other boxes"):
        require_boxes(found, 1e-4, "it")


def detector(folder: Path, head: str = "Detect") -> nn.Module:
    file = folder / "tiny.yaml"
    file.write_text(TINY.replace("Detect", head))
    torch.manual_seed(0)
    model = nampruner.build(f"yolo:{file}", num_classes=3, in_channels=3, image_size=SIZE)
    lively(model)
    for name, parameter in model.named_parameters():
        if ".cv3." in name and name.endswith(".2.bias"):
            parameter.data.fill_(-1.0)  # scores that somebody would look at
    return model.eval()


def pictures() -> Tensor:
    return torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def test_an_export_finds_the_boxes_of_the_network(tmp_path: Path) -> None:
    model = yolo.Exportable(detector(tmp_path))
    found = nampruner.export_onnx(model, tmp_path / "m.onnx", pictures()).boxes
    assert found is not None
    assert found.pairs >= found.boxes - found.ties > 10
    assert found.worst_iou > 0.999


def test_boxes_that_are_sorted_by_score_may_change_places(tmp_path: Path) -> None:
    network: Any = detector(tmp_path, "v10Detect")
    network.end2end = True
    model = yolo.Exportable(network)
    proof = nampruner.export_onnx(model, tmp_path / "m.onnx", pictures())
    assert proof.boxes is not None
    assert proof.boxes.boxes == proof.inputs * len(model(pictures())[0])

    def shuffled(batch: tuple[Tensor, ...]) -> list[Array]:
        return [model(*batch).flip(1).detach().numpy()]

    found = compared(model, shuffled)
    assert found.max_abs == 0
    assert found.boxes is not None
    assert found.boxes.pairs == found.boxes.boxes


def test_scores_that_outputs_of_pixels_hide_are_seen(tmp_path: Path) -> None:
    model = yolo.Exportable(detector(tmp_path))

    def louder(batch: tuple[Tensor, ...]) -> list[Array]:
        outputs = model(*batch).detach().numpy()
        outputs[:, 4:] += 4e-3
        return [outputs]

    found = compared(model, louder)
    assert found.max_relative < 1e-4  # of some 60 pixels
    with pytest.raises(ParityError, match=r"scores up to 0\.004 apart"):
        parity.require(found, 1e-4, "it")


def compared(model: nn.Module, other: parity.Runner) -> Parity:
    with torch.no_grad(), Silent().bar("", 1) as bar:
        return parity.compare(model, other, (pictures(),), bar)
