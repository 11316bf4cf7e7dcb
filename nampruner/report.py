"""One self-contained HTML file about a run, and the one place where its numbers become text.

`before_after_rows` is what the terminal shows and what the file shows; they cannot disagree.
"""

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from jinja2 import Environment, PackageLoader, StrictUndefined

from nampruner.figures import svg
from nampruner.latency import compare
from nampruner.plan import (
    Achieved,
    BoxParity,
    Certificate,
    FoldedGates,
    Latency,
    LayerRecovery,
    PruningPlan,
    Request,
    Verdict,
)
from nampruner.results import OnnxResult, PruneResult, RunResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = tuple[str, str, str, str]
"""Label, dense, slim, change."""

_NOTHING = "–"
_MEASURES = {"accuracy": "test accuracy"}
"""How a measure is called in the table, where that is not its name."""
_PREFIXES = ("", "k", "M", "G", "T")


def count(number: float) -> str:
    """Write a count with three significant digits: 272474 → `272 k`, 40812544 → `40.8 M`."""
    power = 0
    while power < len(_PREFIXES) - 1 and float(f"{number:.3g}") >= 1000:
        number, power = number / 1000, power + 1
    if power == 0:
        return f"{number:.0f}"
    whole = len(str(int(float(f"{number:.3g}"))))
    return f"{number:.{max(3 - whole, 0)}f} {_PREFIXES[power]}"


def size(size_bytes: int) -> str:
    """Write a file size in decimal units: 1090000 → `1.09 MB`."""
    text = count(size_bytes)
    return f"{text}B" if " " in text else f"{text} B"


def percent(share: float) -> str:
    """Write a share of 1 as percent with two digits: 0.974 → `97.40 %`."""
    return f"{100 * share:.2f} %"


def milliseconds(latency: Latency) -> str:
    """Write median and spread, with two digits of the spread: `1.94 ± 0.05 ms`."""
    digits = 1 if latency.spread_ms >= 1 else 2 if latency.spread_ms >= 0.1 else 3
    return f"{latency.median_ms:.{digits}f} ± {latency.spread_ms:.{digits}f} ms"


def _signed(number: float, unit: str, digits: int) -> str:
    """Write a difference with a true minus, and a zero without a sign."""
    text = f"{number:+.{digits}f}".replace("-", "−")
    return f"{text.lstrip('+−') if float(f'{number:.{digits}f}') == 0 else text} {unit}"


def _change(before: float, after: float) -> str:
    return _signed(100 * (after / before - 1), "%", 1) if before else _NOTHING


def _points(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return _NOTHING
    # The difference of the rounded shares: what the reader sees in the row must add up.
    return _signed(round(100 * after, 2) - round(100 * before, 2), "points", 2)


def before_after_rows(result: PruneResult) -> list[Row]:
    """Return the before/after table: (label, dense, slim, change), all ready to be shown.

    Rows for which nothing was measured are left out.
    """
    return [
        *_quality_rows(result),
        *_size_rows(result),
        *_latency_rows(result),
        *(_onnx_rows(result.onnx) if isinstance(result, RunResult) else ()),
    ]


def _quality_rows(result: PruneResult) -> list[Row]:
    rows = []
    for name, slim in result.after.measures.items():
        dense = result.before.measures.get(name)
        shown = _NOTHING if dense is None else percent(dense)
        stages = [(_MEASURES.get(name, name), slim), *_on_the_way(result, name)]
        rows += [(label, shown, percent(share), _points(dense, share)) for label, share in stages]
    return rows


def _on_the_way(result: PruneResult, name: str) -> list[tuple[str, float]]:
    """Return what a measure was before the slim network was trained."""
    if not isinstance(result, RunResult):
        return []
    found = {
        "… right after the cut": result.cut.measures.get(name),
        "… recovered, not yet trained": result.recovered.measures.get(name),
    }
    return [(label, share) for label, share in found.items() if share is not None]


def _size_rows(result: PruneResult) -> list[Row]:
    before, after = result.before, result.after
    rows = [
        ("params", count(before.params), count(after.params), _change(before.params, after.params)),
        ("MACs", count(before.macs), count(after.macs), _change(before.macs, after.macs)),
    ]
    if before.memory is not None and after.memory is not None:
        change = _change(before.memory, after.memory)
        rows.append(("memory, estimated", size(before.memory), size(after.memory), change))
    if before.size_bytes is not None and after.size_bytes is not None:
        change = _change(before.size_bytes, after.size_bytes)
        rows.append(("ONNX file", size(before.size_bytes), size(after.size_bytes), change))
    return rows


def _latency_rows(result: PruneResult) -> list[Row]:
    dense, slim = result.before.latency, result.after.latency
    if dense is None or slim is None:
        return []
    threads = "1 thread" if slim.threads == 1 else f"{slim.threads} threads"
    label = f"latency, batch {slim.batch}, {threads}"
    return [(label, milliseconds(dense), milliseconds(slim), str(compare(dense, slim)))]


def not_faster(result: PruneResult) -> str:
    """Say that a slim network that was timed is not faster; nothing where it is."""
    if result.faster is not False or not result.before.latency or not result.after.latency:
        return ""
    found = compare(result.before.latency, result.after.latency)
    return f"The slim network is not faster: {found}"


def _onnx_rows(onnx: OnnxResult) -> list[Row]:
    parity = onnx.parity
    proof = f"{parity.inputs} inputs"
    if parity.top1_agreement is not None:
        proof = f"top-1 agrees on {percent(parity.top1_agreement)} of {proof}"
    rows = [("ONNX against PyTorch", "", f"{parity.max_relative:.1e} apart", proof)]
    rows += [("boxes", "", "", same_boxes(parity.boxes))] if parity.boxes else []
    return [*rows, ("NAM", "", "", folded_gates(onnx.folded))] if onnx.folded else rows


def same_boxes(found: BoxParity) -> str:
    """Say how many boxes ONNX Runtime and PyTorch both find, and how far these are apart."""
    if not found.boxes:
        return "Neither finds a box"
    ties = f", {found.ties} differ by a tie of scores" if found.ties else ""
    return (
        f"Both find {found.pairs} of {found.boxes} boxes{ties}: overlap at least "
        f"{found.worst_iou:.4f}, {found.worst_shift:.1e} px and {found.worst_score:.1e} of score "
        "apart at most"
    )


def folded_gates(folded: FoldedGates) -> str:
    """Say how many gates became constants, and what that did to the network's outputs."""
    gone = sum(gate.constant for gate in folded.gates)
    return (
        f"{gone} of {len(folded.gates)} gates are constants; that moves the outputs by "
        f"{percent(folded.output_error)}, top-1 agrees on {percent(folded.top1_agreement)}"
    )


def requested_and_achieved(requested: Request, achieved: Achieved) -> str:
    """Say in one sentence what was asked for and what came out."""
    asked = [
        f"ratio {value:g}" if name == "ratio" else f"{name.replace('macs', 'MACs')} {value}"
        for name, value in requested.model_dump(exclude_none=True).items()
    ]
    time = "" if achieved.latency is None else f"{100 * achieved.latency:.1f} % of the time, "
    shares = {
        "MACs": achieved.macs,
        "parameters": achieved.params,
        "estimated memory": achieved.memory,
    }
    *parts, last = (f"{100 * x:.1f} % of the {name}" for name, x in shares.items() if x is not None)
    return (
        f"Requested {', '.join(asked) or 'nothing'}; achieved ratio {achieved.ratio:.3f}, {time}"
        f"{', '.join(parts)} and {last} remain"
    )


def certificate_rows(certificate: Certificate) -> list[tuple[str, str]]:
    """Return what the certificate says: (label, value); what was not computed is left out."""
    exact = (
        f"{certificate.max_relative_error:.1e} on {certificate.inputs} inputs "
        f"in {certificate.dtype}"
    )
    kept: list[tuple[str, float | None]] = [
        ("output error after the cut", certificate.output_error_cut),
        ("output error after recovery", certificate.output_error_recovered),
        ("top-1 agreement with dense after the cut", certificate.top1_agreement_cut),
        ("top-1 agreement with dense after recovery", certificate.top1_agreement_recovered),
    ]
    found = [(label, percent(value)) for label, value in kept if value is not None]
    counts = certificate.verdicts
    told = ", ".join(f"{counts[word]} {word}" for word in get_args(Verdict) if word in counts)
    units = [("removed units", told)] if told else []
    return [("masked against pruned", exact), *found, *units]


def verdict(row: LayerRecovery) -> str:
    """Write what became of a consumer: `exact`, `bounded by 0.031`, `lossy`."""
    bound = f" by {row.bound:.2g}" if row.verdict == "bounded" and row.bound is not None else ""
    return f"{row.verdict}{bound}"


@dataclass(frozen=True)
class _Picture:
    caption: str
    source: str


def render(
    result: RunResult,
    *,
    plan: PruningPlan,
    title: str,
    facts: Mapping[str, str],
    figures: "Mapping[str, Figure]",
) -> str:
    """Return the report as one HTML page that loads nothing from elsewhere.

    Args:
        facts: what the numbers depend on (hardware, versions …); `command` is the line that
            gives them again.
        figures: caption → figure.
    """
    known = {key: text for key, text in facts.items() if key != "command"}
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            finding=_finding(result),
            sentence=requested_and_achieved(result.requested, result.achieved),
            rows=before_after_rows(result),
            runtime=result.after.latency.runtime if result.after.latency else None,
            certificate=certificate_rows(result.certificate),
            recovery=result.certificate.layers,
            plan=plan,
            left_alone=result.left_alone,
            command=facts.get("command"),
            facts=known,
            pictures=[_picture(caption, figure) for caption, figure in figures.items()],
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("nampruner", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["verdict"] = verdict
    return environment


def _finding(result: RunResult) -> str:
    """Say the result in one line, the unwelcome part first."""
    warning = not_faster(result)
    parts = [warning] if warning else []
    parts += [f"{100 * result.after.macs / result.before.macs:.0f} % of the MACs"]
    dense, slim = result.before.measures, result.after.measures
    main = next((name for name in dense if name in slim), None)
    if main is not None:
        parts.append(f"{_points(dense[main], slim[main])} of {main}")
    if result.before.latency and result.after.latency and not warning:
        parts.append(f"latency: {compare(result.before.latency, result.after.latency)}")
    return " · ".join(parts)


def _picture(caption: str, figure: "Figure") -> _Picture:
    data = b64encode(svg(figure)).decode("ascii")
    return _Picture(caption, f"data:image/svg+xml;base64,{data}")
