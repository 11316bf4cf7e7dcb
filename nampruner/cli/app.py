"""The commands. Each finds what is acted on, lets the pipeline do it, and shows what came out.

Options come from `nampruner.config`: a flag is the field of a class there.
"""
# ruff: noqa: B008  (the defaults are frozen)

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from nampruner import console
from nampruner.cli.parameters import (
    FLAT,
    ORDER,
    AllowSlower,
    Checkpoint,
    Json,
    Out,
    Trust,
    examples,
)
from nampruner.config import (
    BenchCommand,
    EvaluateCommand,
    ExportCommand,
    FinetuneCommand,
    PruneCommand,
    RankCommand,
    ReportCommand,
    RunCommand,
    TrainCommand,
)
from nampruner.results import PruneResult


def _status(result: PruneResult, *, allow_slower: bool) -> int:
    """A slim network that was timed and is not faster is something the user can put right."""
    if result.faster is not False or allow_slower:
        return 0
    console.tell("It is not faster here: prune more, or in larger steps; or --allow-slower")
    return 2


app = App(
    name="nampruner",
    help="Train with NAM, read the scale factors, prune CNN channels exactly, recover, export.",
    help_epilogue=examples(
        "nampruner run", "nampruner prune --ratio 0.3", "nampruner bench runs/x/dense runs/x/slim"
    ),
    version=lambda: version("nampruner"),
    default_parameter=Parameter(negative_iterable=()),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)


@app.command(
    sort_key=next(ORDER),
    help_epilogue=examples(
        "nampruner run",
        "nampruner run --data fashion-mnist --epochs 6 --finetune-epochs 2",
        "nampruner run --model yolo:yolov8n.yaml --data my/data.yaml --macs 50%",
    ),
)
def run(
    recipe: Annotated[Path | None, Parameter(help="A recipe.yaml; flags go before it.")] = None,
    /,
    *,
    flags: Annotated[RunCommand, FLAT] = RunCommand(),
    out: Out = None,
    allow_slower: AllowSlower = False,
    json: Json = False,
    trust_source: Trust = False,
) -> int:
    """Go the whole way: train, prune, recover, fine-tune, export, report.

    The folder is named after the options, so the same command goes on with its own unfinished run.
    """
    from nampruner.pipeline.commands import run_command
    from nampruner.recipe import read_recipe

    base = read_recipe(recipe).model_dump(exclude_none=True) if recipe else {}
    progress = console.progress()
    result, folder = run_command(base, flags, out, trust=trust_source, progress=progress)
    console.show(result, *console.before_after(result), as_json=json)
    progress.note(f"Everything is in {folder}; {folder / 'report.html'} shows it")
    return _status(result, allow_slower=allow_slower)


@app.command(
    sort_key=next(ORDER),
    help_epilogue=examples(
        "nampruner train",
        "nampruner train --model timm:resnet18 --data my/images --out my/dense",
        "nampruner train --model yolo:yolov8n.yaml --data my/data.yaml --epochs 50",
    ),
)
def train(
    *,
    flags: Annotated[TrainCommand, FLAT] = TrainCommand(),
    out: Out = None,
    json: Json = False,
    trust_source: Trust = False,
) -> None:
    """Train a network with NAM under the sparsity penalty.

    Without --out it goes where `nampruner run` goes on with the same options.
    """
    from nampruner.pipeline.commands import train_command

    made = train_command(flags, out, trust=trust_source, progress=console.progress())
    console.show(made, console.made(made), as_json=json)


@app.command(
    sort_key=next(ORDER),
    help_epilogue=examples(
        "nampruner rank runs/x/dense",
        "nampruner rank runs/x/dense --importance magnitude --out scores.png",
        "nampruner rank runs/x/dense --latency",
    ),
)
def rank(
    checkpoint: Checkpoint,
    /,
    *,
    flags: Annotated[RankCommand, FLAT] = RankCommand(),
    out: Annotated[
        Path | None, Parameter(help="PNG of the histogram; with --latency also of the staircase.")
    ] = None,
    json: Json = False,
    trust_source: Trust = False,
) -> None:
    """Score every channel and say what some ratios would do. Nothing is touched.

    With --latency it measures, once per device, where fewer channels are less time.
    """
    from nampruner.pipeline.look import draw_scores, rank_path

    ranking = rank_path(checkpoint, flags, trust=trust_source, progress=console.progress())
    if out is not None:
        draw_scores(ranking, out)
    console.show(ranking, *console.ranking(ranking), as_json=json)


@app.command(
    sort_key=next(ORDER),
    help_epilogue=examples(
        "nampruner prune --ratio 0.3",
        "nampruner prune runs/x/dense --macs 50% --ignore 'layer1.*' --dry-run",
        "nampruner prune runs/x/dense --params 1.2M --out my/slim --onnx slim.onnx",
    ),
)
def prune(
    checkpoint: Annotated[
        Path | None,
        Parameter(help="Folder or YOLO .pt; else the newest folder under runs/ never pruned."),
    ] = None,
    /,
    *,
    flags: Annotated[PruneCommand, FLAT] = PruneCommand(),
    dry_run: Annotated[bool, Parameter(negative="", help="Show the plan; write nothing.")] = False,
    out: Out = None,
    allow_slower: AllowSlower = False,
    json: Json = False,
    trust_source: Trust = False,
) -> int:
    """Cut channels out, certify the cut, and recover without training.

    Without a checkpoint anywhere it trains the embedded default first.
    """
    from nampruner.pipeline.commands import plan_command, prune_command

    progress = console.progress()
    if dry_run:
        result, plan = plan_command(checkpoint, flags, trust=trust_source, progress=progress)
        console.show(result, console.plan_table(plan), *console.before_after(result), as_json=json)
        return 0
    result = prune_command(checkpoint, flags, out, trust=trust_source, progress=progress)
    console.show(result, *console.before_after(result), as_json=json)
    progress.note(f"The checkpoint is in {result.checkpoint}")
    return _status(result, allow_slower=allow_slower)


@app.command(
    sort_key=next(ORDER),
    help_epilogue=examples(
        "nampruner finetune runs/x/dense-ratio0.3",
        "nampruner finetune my/slim --finetune-epochs 10 --out my/tuned",
    ),
)
def finetune(
    checkpoint: Checkpoint,
    /,
    *,
    flags: Annotated[FinetuneCommand, FLAT] = FinetuneCommand(),
    out: Out = None,
    json: Json = False,
    trust_source: Trust = False,
) -> None:
    """Train on after the cut, without the penalty."""
    from nampruner.pipeline.commands import finetune_command

    progress = console.progress()
    made = finetune_command(checkpoint, flags, out, trust=trust_source, progress=progress)
    console.show(made, console.made(made), as_json=json)


@app.command(
    sort_key=next(ORDER),
    help_epilogue=examples(
        "nampruner evaluate runs/x/slim",
        "nampruner evaluate runs/x/model.onnx --data my/images",
    ),
)
def evaluate(
    path: Annotated[Path, Parameter(help="A checkpoint or an ONNX file.")],
    /,
    *,
    flags: Annotated[EvaluateCommand, FLAT] = EvaluateCommand(),
    json: Json = False,
    trust_source: Trust = False,
) -> None:
    """Judge a network on the images held out."""
    from nampruner.pipeline.look import evaluate_path

    found = evaluate_path(path, flags, trust=trust_source, progress=console.progress())
    console.show(found, console.evaluated(found), as_json=json)


@app.command(
    sort_key=next(ORDER),
    help_epilogue=examples(
        "nampruner export runs/x/slim --out model.onnx --tolerance 1e-5",
        "nampruner export runs/x/slim --format python --out my/network",
        "nampruner export runs/x/slim --int8 --calibration 512",
    ),
)
def export(
    checkpoint: Checkpoint,
    /,
    *,
    flags: Annotated[ExportCommand, FLAT] = ExportCommand(),
    out: Annotated[Path | None, Parameter(help="The file; for python, the folder.")] = None,
    json: Json = False,
    trust_source: Trust = False,
) -> None:
    """Write what runs the network without nampruner, and prove it on test images."""
    from nampruner.pipeline.commands import export_command

    progress = console.progress()
    found = export_command(checkpoint, flags, out, trust=trust_source, progress=progress)
    console.show(found, *console.exported(found), as_json=json)


@app.command(
    sort_key=next(ORDER),
    help_epilogue=examples(
        "nampruner bench runs/x/dense runs/x/slim --per-layer --out layers.png",
        "nampruner bench before.onnx after.onnx --threads 4 --batch 8",
    ),
)
def bench(
    *paths: Annotated[Path, Parameter(help="Checkpoints or ONNX files; the first is the measure.")],
    flags: Annotated[BenchCommand, FLAT] = BenchCommand(),
    out: Annotated[Path | None, Parameter(help="The figure of --per-layer, a PNG.")] = None,
    json: Json = False,
    trust_source: Trust = False,
) -> None:
    """Time networks in turns, all as ONNX in ONNX Runtime, and say which is faster."""
    from nampruner.pipeline.look import bench as measured

    progress = console.progress()
    found = measured(paths, flags, figure=out, trust=trust_source, progress=progress)
    console.show(found, *console.benchmark(found), as_json=json)


@app.command(
    sort_key=next(ORDER),
    help_epilogue=examples(
        "nampruner report runs/x",
        "nampruner report runs/x/dense-ratio0.3 --out cut.html",
    ),
)
def report(
    path: Annotated[Path, Parameter(help="Folder of a run, or a pruned checkpoint.")],
    /,
    *,
    flags: Annotated[ReportCommand, FLAT] = ReportCommand(),
    out: Annotated[Path | None, Parameter(help="The HTML file.")] = None,
    trust_source: Trust = False,
) -> None:
    """Write what a cut did as one HTML page, its figures beside it."""
    from nampruner.pipeline.whole import report_on

    page = out or path / "report.html"
    report_on(path, flags, page, trust=trust_source, progress=console.progress())
    console.tell(f"The report is {page}")
