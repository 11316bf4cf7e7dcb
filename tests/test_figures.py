"""Figures: what is drawn is what was given, and no global state of matplotlib is touched."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colors, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nampruner.figures import (
    layer_histograms,
    recovered,
    save,
    scale_factor_histogram,
    staircase,
    svg,
    training_curves,
    widths,
)
from nampruner.figures.factors import edges, magnitudes
from nampruner.figures.style import shortened
from nampruner.plan import Achieved, LayerPlan, LayerRecovery, PruningPlan, Request, Size
from nampruner.staircase import Geometry, Staircase, Stairs

DENSE = {
    "layer1.bn": np.array([0.0, 0.0, 0.5, -1.0, 1e-3]),
    "layer2.bn": np.array([[0.25, 0.0], [1e-9, 2.0]]),
}
SLIM = {"layer1.bn": np.array([0.5, -1.0]), "layer2.bn": np.array([2.0])}


def plan(*rows: tuple[str, int, int]) -> PruningPlan:
    return PruningPlan(
        importance="nam",
        allocation="global",
        round_to=8,
        requested=Request(ratio=0.3),
        achieved=Achieved(ratio=0.3, macs=0.5, params=0.6),
        before=Size(params=10, macs=10),
        after=Size(params=6, macs=5),
        layers=tuple(
            LayerPlan(layer=layer, width_before=before, width_after=after)
            for layer, before, after in rows
        ),
        left_alone=(),
        removed={},
        masked={},
    )


def drawn(axes: Axes) -> list[np.ndarray]:
    """Return the counts of every histogram in `axes`."""
    return [patch.get_data().values for patch in axes.patches if hasattr(patch, "get_data")]


def bars(axes: Axes) -> list[list[float]]:
    return [[bar.get_width() for bar in container] for container in axes.containers]


def title(figure: Figure) -> str:
    return figure.axes[0].get_title(loc="left").replace("\u202f", " ")


def test_every_factor_is_counted_once_zeros_apart() -> None:
    figure = scale_factor_histogram(DENSE, SLIM)

    (axes,) = figure.axes
    dense, slim = drawn(axes)
    zeros = [bar.get_height() for container in axes.containers for bar in container]
    assert (dense.sum(), slim.sum()) == (6, 3)
    assert zeros == [3, 0]
    # 1e-9 is nine decades below the largest: it is counted in the first bin, not lost.
    assert dense[0] == 1
    assert axes.get_xscale() == "log"


def test_the_titles_say_how_many_are_zero() -> None:
    assert title(scale_factor_histogram(DENSE)) == "Exactly 0: 3 of 9 scale factors"
    assert title(scale_factor_histogram(DENSE, SLIM, title="net")) == (
        "net\nExactly 0: 3 of 9 → 0 of 3 scale factors"
    )
    assert layer_histograms(DENSE, SLIM).get_suptitle() == (
        "Layers with scale factors at exactly 0: 2 of 2 → 0 of 2"
    )


def test_the_legend_carries_the_given_names() -> None:
    figure = scale_factor_histogram(DENSE, SLIM, names=("at the start", "trained"))

    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["at the start (9)", "trained (3)"]


def test_edges_hold_all_values_of_all_sets() -> None:
    bins = edges(np.array([0.0, 1e-2, 3.0]), np.array([7.0]))

    assert bins[0] < 1e-2
    assert bins[-1] > 7.0
    assert np.allclose(np.diff(np.log(bins)), np.log(bins[1] / bins[0]))


@pytest.mark.parametrize("factors", [{}, {"bn": np.zeros(4)}, {"bn": np.ones(4)}])
def test_nothing_all_zero_and_all_equal_can_be_drawn(factors: dict[str, np.ndarray]) -> None:
    figure = scale_factor_histogram(factors)

    ones = int((magnitudes(factors) == 1).sum())
    assert drawn(figure.axes[0])[0].sum() == ones
    assert svg(layer_histograms(factors)).startswith(b"<?xml")


@pytest.mark.parametrize("number", [1, 5, 100])
def test_one_panel_per_layer_each_with_its_own_counts(number: int) -> None:
    rng = np.random.default_rng(0)
    factors = {f"layer{i}": rng.uniform(0.1, 1, i + 1) for i in range(number)}

    figure = layer_histograms(factors)

    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [drawn(axes)[0].sum() for axes in panels] == list(range(1, number + 1))
    assert [axes.get_title(loc="left") for axes in panels] == list(factors)


def test_a_layer_that_is_gone_keeps_its_panel() -> None:
    figure = layer_histograms(DENSE, {"layer2.bn": np.array([2.0])})

    # Its own three that are not zero, then the two empty ones that make the legend.
    assert [counts.sum() for counts in drawn(figure.axes[0])] == [3, 0, 0]
    assert figure.axes[0].texts[0].get_text() == "0: 40 %"
    assert figure.axes[1].texts[0].get_text() == "0: 25 % → 0 %"


def test_widths_are_the_plan_s() -> None:
    figure = widths(plan(("conv1", 16, 16), ("conv2", 64, 48), ("conv3", 20, 4)))

    (axes,) = figure.axes
    assert bars(axes) == [[16, 64, 20], [48, 4], [16]]
    assert [text.get_text() for text in axes.texts] == ["16", "64 → 48", "20 → 4"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1", "conv2", "conv3"]
    assert axes.yaxis.get_inverted()
    assert title(figure) == "32 of 100 channels go (32 %)"


def test_widths_of_a_hundred_layers_and_of_none() -> None:
    many = widths(plan(*((f"block{i}.conv", 64, 32) for i in range(100))))
    none = widths(plan())

    assert many.get_figheight() > 3 * widths(plan(("a", 1, 1))).get_figheight()
    assert title(none) == "0 of 0 channels go"


METRICS = [
    {"stage": "train", "epoch": 1, "loss": 2.0, "train_accuracy": 0.4, "zeros": 0},
    {"stage": "train", "epoch": 2, "loss": 1.0, "validation_accuracy": 0.9, "zeros": 7},
    {"stage": "finetune", "epoch": 1, "loss": 0.5, "validation_accuracy": 0.95, "zeros": 2},
]


def test_curves_run_on_through_the_stages_without_joining_them() -> None:
    figure = training_curves(METRICS)

    accuracy, loss, zeros = figure.axes
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in zeros.lines[:2]]
    assert lines == [([1, 2], [0, 7]), ([3], [2])]
    assert [list(line.get_ydata()) for line in loss.lines[:2]] == [[2.0, 1.0], [0.5]]
    assert list(accuracy.lines[0].get_ydata()) == [0.4]
    assert title(figure) == "Validation accuracy: 90.00 % after train, 95.00 % after finetune"


def test_curves_of_nothing_can_be_drawn() -> None:
    assert title(training_curves([])) == "No validation accuracy recorded"


def test_save_writes_a_png_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "widths.png"
    path.write_bytes(b"older")

    save(widths(plan(("a", 8, 4))), path)

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_save_leaves_the_older_file(tmp_path: Path) -> None:
    class Broken(Figure):
        def savefig(self, fname: Path, **_: object) -> None:
            Path(fname).write_bytes(b"half")
            raise OSError("disk full")

    path = tmp_path / "a.png"
    path.write_bytes(b"older")

    with pytest.raises(OSError, match="disk full"):
        save(Broken(), path)

    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_svg_is_the_same_every_time_and_settings_are_put_back() -> None:
    before = dict(rcParams)

    first, second = (svg(widths(plan(("a", 8, 4)))) for _ in range(2))

    assert first == second
    assert dict(rcParams) == before


def test_pyplot_is_never_imported_and_matplotlib_only_when_drawing() -> None:
    code = (
        "import sys, nampruner.figures as f\n"
        "assert 'matplotlib' not in sys.modules\n"
        "f.svg(f.training_curves([{'stage': 'train', 'loss': 1.0}]))\n"
        "assert 'matplotlib.figure' in sys.modules\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_the_two_colours_differ_in_grey_too() -> None:
    from nampruner.figures.style import AFTER, BEFORE, PALE

    grey = [np.dot(colors.to_rgb(c), (0.299, 0.587, 0.114)) for c in (BEFORE, AFTER, PALE)]
    assert np.diff(sorted(grey)).min() > 0.08


def test_shortening_keeps_the_end() -> None:
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "…cdefg"


def test_recovery_is_drawn_layer_by_layer() -> None:
    layers = [
        LayerRecovery(layer=f"layer{i}.conv", removed=8, explained=share, method="taps")
        for i, share in enumerate((0.5, 1.0))
    ]
    axes = recovered(layers).axes[0]
    assert "75 %" in axes.get_title(loc="left")
    widths = [patch.get_width() for patch in axes.patches]
    assert widths == [100.0, 100.0, 50.0, 100.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer0.conv", "layer1.conv"]


def test_staircase_has_a_panel_per_kind_and_names_its_steps() -> None:
    shape = {"groups": 1, "stride": (1, 1), "dilation": (1, 1), "size": (7, 7)}
    dense = Geometry(inputs=32, outputs=32, kernel=(3, 3), **shape)
    pointwise = Geometry(inputs=16, outputs=16, kernel=(1, 1), **shape)
    stairs = (
        Stairs(geometry=dense, layers=2, widths=(32, 24, 16), ms=(4.0, 3.0, 2.0)),
        Stairs(geometry=pointwise, layers=1, widths=(16, 12, 8), ms=(2.0, 2.0, 2.0)),
        Stairs(geometry=pointwise, layers=1, widths=(16, 12, 8), ms=(3.0, 2.0, 1.0), int8=True),
    )
    figure = staircase(Staircase(threads=1, stairs=stairs))

    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "dense: step 8",
        "pointwise: step 8 (float 8, INT8 4)",
    ]
    styles = [line.get_linestyle() for line in figure.axes[1].lines if len(line.get_xdata()) == 3]
    assert styles == ["-", "--"]
    (line,) = [each for each in figure.axes[0].lines if len(each.get_xdata()) == 3]
    assert list(line.get_ydata()) == [1.0, 0.75, 0.5]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["0", "8", "16"]
