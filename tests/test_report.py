"""Report: the arithmetic of the table, and a page that is whole in itself."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from nampruner.plan import (
    Achieved,
    Certificate,
    Latency,
    LayerPlan,
    LayerRecovery,
    LeftAlone,
    Parity,
    PruningPlan,
    Repair,
    Request,
    Size,
)
from nampruner.report import (
    before_after_rows,
    certificate_rows,
    count,
    milliseconds,
    render,
    requested_and_achieved,
    size,
)
from nampruner.results import Measured, OnnxResult, PruneResult, RunResult

GOLDEN = Path(__file__).parent / "golden" / "before_after_rows.txt"

PLAN = PruningPlan(
    importance="nam",
    allocation="global",
    round_to=8,
    requested=Request(ratio=0.3),
    achieved=Achieved(ratio=0.2976, macs=0.4904, params=0.6279),
    before=Size(params=272_474, macs=40_812_544),
    after=Size(params=171_090, macs=20_014_080),
    layers=(
        LayerPlan(layer="conv1", width_before=16, width_after=16),
        LayerPlan(layer="layer1.0.conv1", width_before=64, width_after=48, threshold=0.01234567),
    ),
    left_alone=(LeftAlone(layer="fc<1>", reason="output & more"),),
    removed={},
    masked={},
    repairs=(Repair(module="block", attribute="width", before=64, after=48),),
)


def latency(median_ms: float, spread_ms: float) -> Latency:
    return Latency(
        median_ms=median_ms,
        spread_ms=spread_ms,
        runs=400,
        threads=1,
        batch=1,
        runtime="onnxruntime 1.32.0 CPUExecutionProvider",
    )


RESULT = RunResult(
    requested=PLAN.requested,
    achieved=PLAN.achieved,
    before=Measured(
        params=272_474,
        macs=40_812_544,
        accuracy=0.974,
        size_bytes=1_120_400,
        latency=latency(0.486, 0.012),
    ),
    after=Measured(
        params=171_090,
        macs=20_014_080,
        accuracy=0.976,
        size_bytes=713_000,
        latency=latency(0.300, 0.009),
    ),
    certificate=Certificate(
        max_relative_error=3.2e-15,
        inputs=4,
        output_error_cut=0.31,
        layers=(
            LayerRecovery(
                layer="layer1.0.conv2",
                removed=16,
                explained=0.875,
                method="taps",
                border=0.25,
                verdict="bounded",
                bound=0.0312,
            ),
            LayerRecovery(layer="layer1.1.conv2", removed=2, explained=None, method="constant"),
        ),
        verdicts={"lossy": 9, "exact": 7},
    ),
    left_alone=PLAN.left_alone,
    accuracy_cut=0.31,
    accuracy_recovered=0.9512,
    onnx=OnnxResult(
        path="runs/a/model.onnx",
        parity=Parity(max_abs=2.1e-6, max_relative=3.4e-7, top1_agreement=1.0, inputs=64),
        latency_ms={"dense": 0.486, "slim": 0.3},
    ),
)


def test_the_table_is_the_golden_one() -> None:
    lines = [" | ".join(row) for row in before_after_rows(RESULT)]
    assert "\n".join(lines) + "\n" == GOLDEN.read_text(encoding="utf-8")


def test_changes_follow_from_the_two_columns() -> None:
    change = {label: text.replace("−", "-") for label, _, _, text in before_after_rows(RESULT)}

    assert change["test accuracy"] == "+0.20 points"
    assert float(change["params"].split()[0]) == pytest.approx(
        100 * (171_090 - 272_474) / 272_474, abs=0.05
    )
    assert float(change["MACs"].split()[0]) == pytest.approx(
        100 * (20_014_080 - 40_812_544) / 40_812_544, abs=0.05
    )


def test_what_was_not_measured_has_no_row() -> None:
    bare = PruneResult(
        requested=PLAN.requested,
        achieved=PLAN.achieved,
        before=Measured(params=100, macs=0),
        after=Measured(params=50, macs=0),
        certificate=RESULT.certificate,
        left_alone=(),
    )

    assert before_after_rows(bare) == [("params", "100", "50", "−50.0 %"), ("MACs", "0", "0", "–")]


def test_an_accuracy_without_a_dense_one_has_no_change() -> None:
    result = RESULT.model_copy(
        update={"before": RESULT.before.model_copy(update={"accuracy": None})}
    )

    assert before_after_rows(result)[0] == ("test accuracy", "–", "97.60 %", "–")


def test_equal_numbers_have_no_sign() -> None:
    same = RESULT.model_copy(update={"after": RESULT.before})
    change = {label: text for label, _, _, text in before_after_rows(same)}

    assert change["test accuracy"] == "0.00 points"
    assert change["params"] == "0.0 %"
    assert change["latency, batch 1, 1 thread"] == "no difference outside the noise"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1_000, "1.00 k"),
        (9_994, "9.99 k"),
        (9_996, "10.0 k"),
        (272_474, "272 k"),
        (999_499, "999 k"),
        (999_600, "1.00 M"),
        (40_812_544, "40.8 M"),
        (4_089_000_000, "4.09 G"),
        (99_960_000_000, "100 G"),
        (15_500_000_000_000_000, "15500 T"),
    ],
)
def test_counts_have_three_digits(number: int, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(512, "512 B"), (1_090_000, "1.09 MB"), (44_719_344, "44.7 MB")]
)
def test_sizes_are_decimal(size_bytes: int, text: str) -> None:
    assert size(size_bytes) == text


@pytest.mark.parametrize(
    ("median_ms", "spread_ms", "text"),
    [
        (0.486, 0.0121, "0.486 ± 0.012 ms"),
        (1.942, 0.153, "1.94 ± 0.15 ms"),
        (52.43, 1.26, "52.4 ± 1.3 ms"),
    ],
)
def test_latency_is_written_as_precisely_as_it_is_known(
    median_ms: float, spread_ms: float, text: str
) -> None:
    assert milliseconds(latency(median_ms, spread_ms)) == text


@pytest.mark.parametrize(
    ("request_", "asked"),
    [
        (Request(ratio=0.3), "Requested ratio 0.3; "),
        (Request(macs="50%"), "Requested MACs 50%; "),
        (Request(params="1.2M"), "Requested params 1.2M; "),
    ],
)
def test_requested_and_achieved_are_both_said(request_: Request, asked: str) -> None:
    assert requested_and_achieved(request_, PLAN.achieved) == (
        f"{asked}achieved ratio 0.298, 49.0 % of the MACs and 62.8 % of the parameters remain"
    )


def test_memory_is_told_where_a_plan_knows_it() -> None:
    sizes = ({"memory": 2_000_000}, {"memory": 900_000})
    result = RESULT.model_copy(
        update={
            "before": RESULT.before.model_copy(update=sizes[0]),
            "after": RESULT.after.model_copy(update=sizes[1]),
        }
    )
    row = ("memory, estimated", "2.00 MB", "900 kB", "−55.0 %")
    assert row in before_after_rows(result)
    assert row[0] not in {label for label, *_ in before_after_rows(RESULT)}
    asked, achieved = Request(ratio=0.3, memory="1MB"), PLAN.achieved
    assert requested_and_achieved(asked, achieved.model_copy(update={"memory": 0.45})) == (
        "Requested ratio 0.3, memory 1MB; achieved ratio 0.298, 49.0 % of the MACs, "
        "62.8 % of the parameters and 45.0 % of the estimated memory remain"
    )


def test_the_certificate_says_what_was_computed_and_no_more() -> None:
    assert certificate_rows(RESULT.certificate) == [
        ("masked against pruned", "3.2e-15 on 4 inputs in float64"),
        ("output error after the cut", "31.00 %"),
        ("removed units", "7 exact, 9 lossy"),
    ]


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed by its own end tag."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def html() -> str:
    figure = Figure()
    figure.subplots().plot([1, 2])
    return render(
        RESULT,
        plan=PLAN,
        title="resnet20 <on> mnist5k",
        facts={"hardware": "2 cores & 8 GB", "command": "nampruner run --seed 0"},
        figures={'Scale factors "before"': figure},
    )


def test_the_page_is_well_formed_and_shows_every_row(html: str) -> None:
    page = Page(html)

    assert page.open == []
    for row in before_after_rows(RESULT):
        assert list(row) in page.rows
    assert ["layer1.0.conv1", "64", "48", "0.01235"] in page.rows
    assert ["conv1", "16", "16", ""] in page.rows
    assert ["layer1.0.conv2", "16", "87.50 %", "taps", "25.00 %", "bounded by 0.031"] in page.rows
    assert ["layer1.1.conv2", "2", "–", "constant", "0.00 %", "lossy"] in page.rows
    assert ["hardware", "2 cores & 8 GB"] in page.rows
    assert "nampruner run --seed 0" in html
    assert "block.width</code> 64 → 48" in html


def test_what_users_named_is_escaped(html: str) -> None:
    assert "<h1>resnet20 &lt;on&gt; mnist5k</h1>" in html
    assert ["fc<1>", "output & more"] in Page(html).rows
    assert "<on>" not in html
    assert "<1>" not in html


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    tags = Page(html).seen
    sources = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]

    assert len(sources) == 1
    assert sources[0].startswith("data:image/svg+xml;base64,")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    assert not re.search(r"https?:|url\(|@import", html)


def test_it_is_made_for_phones_paper_and_dark_rooms(html: str) -> None:
    metas = [attributes for tag, attributes in Page(html).seen if tag == "meta"]

    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    for wanted in ("@media print", "prefers-color-scheme: dark", "max-width: 30rem"):
        assert wanted in html


def test_the_first_line_tells_the_result_the_unwelcome_one_too(html: str) -> None:
    slower = RESULT.after.model_copy(update={"latency": latency(0.972, 0.01)})
    unwelcome = render(
        RESULT.model_copy(update={"after": slower}), plan=PLAN, title="t", facts={}, figures={}
    )

    assert "49 % of the MACs · +0.20 points of accuracy · latency: 1.62× faster" in html
    assert "latency: 2.00× slower" in unwelcome
    assert "<h2>Figures</h2>" not in unwelcome
