"""The door: help is instant, every mistake is one message and exit code 2, JSON is one object."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Never

import onnx
import pytest

import nampruner
from nampruner.cli import call
from nampruner.config import PruneCommand, RunCommand
from nampruner.console import bars
from nampruner.export import read_metadata
from nampruner.progress import Progress
from nampruner.recipe import Recipe, merged

TINY = ("--model", "resnet20?width=4", "--data", "digits", "--epochs", "1", "--round-to", "2")
COMMANDS = (
    *("run", "train", "rank", "prune", "finetune", "evaluate", "export", "bench", "report"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that `nampruner train` left."""
    out = tmp_path_factory.mktemp("trained") / "dense"
    assert call(["train", *TINY[:6], "--out", str(out)]) == 0
    return out


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def everything(folder: Path) -> dict[str, bytes | None]:
    """Return path → content of all that is under `folder`."""
    found = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from nampruner.cli import call; status = call(['--help']); "
        "heavy = {'torch', 'timm', 'numpy', 'matplotlib', 'onnx', 'scipy'} & set(sys.modules); "
        "sys.exit(f'{status} {heavy}' if status or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert re.search(rf"^│ {command} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_ends_with_real_lines(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from nampruner.cli.app import app

    assert call([command, "--help"]) == 0
    _, _, examples = capsys.readouterr().out.partition("Examples:")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    assert 2 <= len(lines) <= 3
    for line in lines:
        words = [word.strip("'") for word in line.split()]
        assert words[:2] == ["nampruner", command]
        app.parse_args(words[1:], exit_on_error=False, print_error=False)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--version"]) == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


def truncated(trained: Path, here: Path) -> list[str]:
    copy = shutil.copytree(trained, here / "broken")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return ["prune", str(copy), "--ratio", "0.3"]


def disagreeing(trained: Path, here: Path) -> list[str]:
    copy = shutil.copytree(trained, here / "broken")
    record = json.loads((copy / "nampruner.json").read_text())
    record["lineage"]["source"] = "resnet20?width=6"
    (copy / "nampruner.json").write_text(json.dumps(record))
    return ["prune", str(copy), "--ratio", "0.3"]


def foreign_folder(command: str) -> list[str]:
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    return [command, *(TINY if command == "run" else TINY[:6]), "--out", "mine"]


def empty_tree(trained: Path, here: Path) -> list[str]:
    (here / "pictures").mkdir()
    return ["run", "--data", "pictures"]


MISTAKES = {
    "ratio above 1": (lambda t, h: ["prune", str(t), "--ratio", "1.2"], "--ratio = '1.2'"),
    "ratio below 0": (lambda t, h: ["prune", str(t), "--ratio", "-0.1"], "--ratio = '-0.1'"),
    "two targets": (
        lambda t, h: ["prune", str(t), "--ratio", "0.3", "--macs", "50%"],
        "ratio and macs were given together",
    ),
    "no target": (lambda t, h: ["prune", str(t)], "give one of --ratio, --macs, --params"),
    "amount": (lambda t, h: ["prune", str(t), "--macs", "half"], "give 50%, 0.5 or 2.1G"),
    "too much": (lambda t, h: ["run", *TINY, "--macs", "120%"], "what remains must lie in"),
    "model": (lambda t, h: ["run", "--model", "resnt20"], "Did you mean resnet20"),
    "data set": (lambda t, h: ["run", "--data", "digitz"], "Did you mean digits"),
    "no classes": (empty_tree, "one folder per class"),
    "truncated": (truncated, "model.safetensors is damaged"),
    "disagreeing": (disagreeing, "do not fit each other"),
    "ignore glob": (
        lambda t, h: ["prune", str(t), "--ratio", "0.3", "--ignore", "layr*"],
        "ignore = 'layr*' matches no layer",
    ),
    "ignore glob, run": (lambda t, h: ["run", *TINY, "--ignore", "layr*"], "matches no layer"),
    "nam glob": (lambda t, h: ["train", *TINY[:6], "--nam-at", "layr*"], "matches no module"),
    "foreign folder, run": (lambda t, h: foreign_folder("run"), "mine exists and is no run"),
    "foreign folder, train": (lambda t, h: foreign_folder("train"), "mine exists and is no"),
    "foreign checkpoint": (
        lambda t, h: ["prune", str(t), "--ratio", "0.3", "--out", str(t)],
        "give --out another folder",
    ),
    "foreign file": (
        lambda t, h: ["export", str(t), "--out", str(t / "nampruner.json")],
        "nampruner.json",
    ),
    "export of another format": (
        lambda t, h: ["export", str(t), "--format", "python", "--out", str(t)],
        "is no python export of nampruner",
    ),
    "tolerance of equal bits": (
        lambda t, h: ["export", str(t), "--format", "python", "--tolerance", "1e-3"],
        "--tolerance does not apply",
    ),
    "folded gates of equal bits": (
        lambda t, h: ["export", str(t), "--format", "python", "--fold-gates", "1e-3"],
        "--fold-gates does not apply",
    ),
    "both in fewer bits": (
        lambda t, h: ["export", str(t), "--int8", "--fp16"],
        "--int8 and --fp16 were given together",
    ),
    "int8 of another format": (
        lambda t, h: ["export", str(t), "--int8", "--format", "pt2"],
        "--int8 is ONNX; leave out --format pt2",
    ),
    "int8 within a tolerance": (
        lambda t, h: ["export", str(t), "--int8", "--tolerance", "1e-3"],
        "--tolerance does not apply to --int8",
    ),
    "drop of a classifier": (
        lambda t, h: ["export", str(t), "--int8", "--drop", "0.1"],
        "--drop is for detectors",
    ),
    "agreement of half": (
        lambda t, h: ["export", str(t), "--fp16", "--agreement", "0.9"],
        "--agreement does not apply to --fp16, only to --int8",
    ),
    "time": (lambda t, h: ["prune", str(t), "--latency", "soon"], "give 60%, 0.6 or 5ms"),
    "rounding to nothing": (
        lambda t, h: ["prune", str(t), "--ratio", "0.3", "--round-to", "0"],
        "a whole number from 1 on, or auto",
    ),
    "rounding to a word": (
        lambda t, h: ["prune", str(t), "--ratio", "0.3", "--round-to", "device"],
        "--round-to",
    ),
    "gates folded at any error": (
        lambda t, h: ["export", str(t), "--fold-gates", "1"],
        "--fold-gates = '1'",
    ),
    "a file of somebody else": (
        lambda t, h: ["prune", str(t), "--ratio", "0.3", "--onnx", str(t / "nampruner.json")],
        "nampruner.json",
    ),
    "format": (lambda t, h: ["export", str(t), "--format", "tflite"], "--format = 'tflite'"),
    "flag": (lambda t, h: ["run", "--epohcs", "3"], "Did you mean --epochs"),
    "command": (lambda t, h: ["prun"], 'Did you mean "prune"'),
    "choice": (lambda t, h: ["run", "--importance", "nma"], "--importance = 'nma'"),
    "device": (lambda t, h: ["run", *TINY, "--device", "gpu"], "give auto, cpu, cuda or cuda:N"),
    "checkpoint": (lambda t, h: ["evaluate", str(t.parent)], "Did you mean"),
    "nothing": (lambda t, h: ["evaluate", "nothing"], "there is no such folder"),
    "one candidate": (lambda t, h: ["bench", str(t)], "at least two"),
    "recipe": (lambda t, h: ["run", "recipe.yaml"], "recipe recipe.yaml"),
    "never pruned": (lambda t, h: ["report", str(t)], "was never pruned"),
    "dry run of nothing": (lambda t, h: ["prune", "--ratio", "0.3", "--dry-run"], "no checkpoint"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_writes_nothing(
    mistake: str, trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = MISTAKES[mistake]
    line = arguments(trained, here)
    before = everything(here), everything(trained)

    assert call(line) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("error: ") == 1
    assert err.count("\n") == 1
    assert message in err
    assert (everything(here), everything(trained)) == before


def test_all_mistakes_come_in_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["run", "--epochs", "0", "--floor", "2"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--epochs" in err
    assert "--floor" in err


def test_a_bug_keeps_its_traceback_and_an_interruption_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nampruner.pipeline import look

    def fail(*_: object, **__: object) -> Never:
        raise RuntimeError("a bug")

    def interrupt(*_: object, **__: object) -> Never:
        raise KeyboardInterrupt

    monkeypatch.setattr(look, "bench", fail)
    assert call(["bench", "a", "b"]) == 1
    assert "RuntimeError: a bug" in capsys.readouterr().err
    monkeypatch.setattr(look, "bench", interrupt)
    assert call(["bench", "a", "b"]) == 130
    assert "same command goes on" in capsys.readouterr().err


def test_a_flag_beats_the_recipe_beats_the_default(here: Path) -> None:
    recipe = merged({"epochs": 3, "ratio": 0.2}, RunCommand(macs="50%", batch_size=16), "here")

    assert (recipe.epochs, recipe.batch_size, recipe.macs, recipe.ratio) == (3, 16, "50%", None)
    assert recipe.lr == Recipe().lr
    assert merged({}, PruneCommand(), "here").ratio == 0.3


def test_dry_run_shows_the_plan_and_writes_nothing(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(here), everything(trained.parent)
    line = ["prune", str(trained), "--ratio", "0.3", "--round-to", "2", "--dry-run"]

    assert call(line) == 0
    shown = capsys.readouterr().out
    assert call([*line, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)

    rows = re.findall(r"^(\S+) +(\d+) → (\d+)", shown, re.MULTILINE)
    wide = sum(int(width) for _, width, _ in rows)
    gone = wide - sum(int(width) for _, _, width in rows)
    assert gone / wide == pytest.approx(result["achieved"]["ratio"])
    assert "output of the network" in shown
    assert "checkpoint" not in result
    assert (everything(here), everything(trained.parent)) == before


def test_memory_is_a_limit_alone_or_beside_another_target(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["prune", str(trained), "--round-to", "2", "--dry-run", "--json", "--memory"]
    found = {}
    for more in ([], ["--ratio", "0.1"]):
        assert call([*line, "70%", *more]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["after"]["memory"] <= 0.7 * result["before"]["memory"]
        assert result["requested"]["memory"] == "70%"
        found[len(more)] = result
    assert found[0]["before"]["memory"] > 4 * found[0]["before"]["params"]
    assert call([*line, "1kB"]) == 2
    assert "memory = '1kB' asks for 1000 bytes" in capsys.readouterr().err
    target = trained.with_name(f"{trained.name}-ratio0.1-memory70pct")
    try:
        assert (
            call(["prune", str(trained), "--round-to", "2", "--ratio", "0.1", "--memory", "70%"])
            == 0
        )
        assert target.is_dir()
        assert "memory, estimated" in capsys.readouterr().out
    finally:
        shutil.rmtree(target, ignore_errors=True)


def test_prune_and_what_looks_at_it(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = here / "slim"
    line = ["prune", str(trained), "--ratio", "0.3", "--round-to", "2", "--out", str(out), "--json"]
    assert call(line) == 0
    result = json.loads(capsys.readouterr().out)

    assert result["requested"] == {"ratio": 0.3}
    assert 0 < result["achieved"]["ratio"] <= 0.3
    assert result["certificate"]["max_relative_error"] <= 1e-9
    assert result["certificate"]["dtype"] == "float64"
    assert {"params", "macs", "accuracy"} <= set(result["before"]) & set(result["after"])
    assert result["checkpoint"] == str(out)
    slim = nampruner.load(out)
    assert sum(p.numel() for p in slim.parameters()) == result["after"]["params"]

    assert call(line) == 0
    assert json.loads(capsys.readouterr().out) == result

    assert call(["evaluate", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["after"]["accuracy"]


def test_export_evaluate_and_bench(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["export", str(trained), "--out", "a.onnx", "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert exported["parity"]["inputs"] == 64
    assert exported["size_bytes"] == Path("a.onnx").stat().st_size

    accuracies = []
    for path in ("a.onnx", str(trained)):
        assert call(["evaluate", path, "--json"]) == 0
        accuracies.append(json.loads(capsys.readouterr().out)["accuracy"])
    assert accuracies[0] == accuracies[1]

    shutil.copy("a.onnx", "b.onnx")
    assert call(["bench", "a.onnx", "b.onnx", "--rounds", "5", "--json"]) == 0
    candidates = json.loads(capsys.readouterr().out)["candidates"]
    assert [each["path"] for each in candidates] == ["a.onnx", "b.onnx"]
    assert candidates[0]["times"] == 1.0

    line = ["bench", "a.onnx", "b.onnx", "--rounds", "1", "--out", "figures/layers.png"]
    assert call(line) == 2
    assert "--per-layer" in capsys.readouterr().err
    assert call([*line, "--per-layer"]) == 0
    shown = capsys.readouterr().out
    assert "conv1" in shown
    assert "other layers" in shown
    assert Path("figures/layers.png").read_bytes().startswith(b"\x89PNG")


def test_gates_that_hardly_move_are_folded_and_told(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["export", str(trained), "--out", "a.onnx", "--fold-gates"]
    assert call([*line, "0.5", "--json"]) == 0
    folded = json.loads(capsys.readouterr().out)["folded"]

    assert folded["bound"] == 0.5
    assert len(folded["gates"]) == 18
    assert all(gate["constant"] and 0 < gate["error"] < 0.5 for gate in folded["gates"])
    assert 0 < folded["output_error"] < 0.5
    operators = {node.op_type for node in onnx.load("a.onnx").graph.node}
    assert not operators & {"Sigmoid", "BatchNormalization", "Mul"}

    assert call([*line, "1e-9"]) == 0
    shown = capsys.readouterr().out
    assert "0 of 18 gates are constants; that moves the outputs by 0.00 %" in shown


def test_a_cut_can_be_exported_and_timed_at_once(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["prune", str(trained), "--ratio", "0.3", "--round-to", "2", "--out", "slim"]
    status = call([*line, "--onnx", "slim.onnx", "--json"])
    result = json.loads(capsys.readouterr().out)

    assert status == (0 if result["faster"] else 2)
    assert result["after"]["size_bytes"] == Path("slim.onnx").stat().st_size
    assert result["before"]["latency"]["threads"] == result["after"]["latency"]["threads"] == 1
    assert sorted(path.name for path in here.iterdir()) == ["slim", "slim.onnx"]


@pytest.mark.parametrize(("kind", "default"), [("pt2", "dense.pt2"), ("python", "dense-python")])
def test_other_formats_have_names_of_their_own(
    kind: str, default: str, trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, "dense")
    line = ["export", "dense", "--format", kind, "--parity-inputs", "8"]
    assert call([*line, "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)

    assert (exported["format"], exported["path"]) == (kind, default)
    assert exported["parity"]["inputs"] == 8
    assert exported["parity"]["max_relative"] <= 1e-6
    files = [path for path in here.rglob("*") if path.is_file() and default in path.parts]
    assert exported["size_bytes"] == sum(path.stat().st_size for path in files)
    record = json.loads(read_metadata(default)["nampruner"])
    assert record["data"] == "digits"
    if kind == "python":
        assert '# "data": "digits"' in Path(default, "model.py").read_text()
    assert call([*line, "--out", "dense"]) == 2
    assert f"dense exists and is no {kind} export" in capsys.readouterr().err


def test_int8_is_told_beside_its_float_file(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["export", str(trained), "--int8", "--calibration", "64", "--agreement", "0.5"]
    assert call([*line, "--out", "int8.onnx", "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)

    gain = exported["int8"]
    assert (exported["format"], exported["path"]) == ("int8", "int8.onnx")
    assert gain["calibration"] == 64
    assert exported["size_bytes"] == Path("int8.onnx").stat().st_size
    assert gain["latency"]["threads"] == gain["latency_float"]["threads"] == 1
    assert call(["evaluate", "int8.onnx", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["accuracy"] == gain["accuracy"]
    assert exported["parity"]["inputs"] == evaluated["images"]
    assert [path.name for path in here.iterdir()] == ["int8.onnx"]


def test_half_has_a_tolerance_of_its_own(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["export", str(trained), "--fp16", "--out", "half.onnx"]
    assert call([*line, "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert exported["format"] == "fp16"
    assert 1e-6 < exported["parity"]["max_relative"] < 1e-2

    assert call([*line, "--tolerance", "1e-6"]) == 2
    assert "1e-06 is allowed" in capsys.readouterr().err


def test_rank_shows_scores_and_touches_nothing(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(trained.parent)
    assert call(["rank", str(trained), "--round-to", "2", "--out", "scores.png", "--json"]) == 0
    ranking = json.loads(capsys.readouterr().out)

    assert [row["ratio"] for row in ranking["would_be"]] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    macs = [row["macs"] for row in ranking["would_be"]]
    assert macs == sorted(macs, reverse=True)
    assert len(ranking["scores"]) == sum(row["width"] for row in ranking["layers"])
    assert Path("scores.png").read_bytes().startswith(b"\x89PNG")
    assert everything(trained.parent) == before


def test_rank_says_where_a_step_of_width_saves_time(
    trained: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from nampruner.staircase import bench

    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    # as wide as in blocks of eight channels
    monkeypatch.setattr(
        bench.Bench, "_onnxruntime", lambda _, each, int8: [float(-(-g.outputs // 8)) for g in each]
    )
    line = ["rank", str(trained), "--latency", "--out", "scores.png"]
    assert call([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert {row["step"] for row in found["times"]} == {8}
    assert sum(row["share"] for row in found["times"]) == pytest.approx(1.0)
    assert Path("scores-staircase.png").read_bytes().startswith(b"\x89PNG")
    assert call(line) == 0
    shown = capsys.readouterr().out
    assert "a step saves" in shown
    assert "importance paid" in shown
    assert "Steps of this device: dense 8 (float 8, INT8 8)" in shown


def test_auto_rounding_is_measured_and_kept(
    trained: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from nampruner.staircase import bench

    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    monkeypatch.setattr(
        bench.Bench, "_onnxruntime", lambda _, each, int8: [float(-(-g.outputs // 2)) for g in each]
    )
    line = ["prune", str(trained), "--ratio", "0.3", "--round-to", "auto", "--dry-run"]
    assert call([*line, "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["achieved"]["ratio"] <= 0.3

    monkeypatch.setattr(bench.Bench, "_onnxruntime", None)
    assert call(line) == 0
    rows = re.findall(r"^(\S+) +(\d+) → (\d+)", capsys.readouterr().out, re.MULTILINE)
    assert all(int(after) % 2 == 0 for _, before, after in rows if before != after)
    assert len(list((here / "cache" / "nampruner").iterdir())) == 1


def test_finetune_goes_on_from_a_checkpoint(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["finetune", str(trained), "--finetune-epochs", "1", "--out", "tuned", "--json"]
    assert call(line) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)

    assert re.search(r"^finetune +done +loss \S+  accuracy [\d.]+ %  \d+:\d\d$", err, re.MULTILINE)
    assert made["checkpoint"] == "tuned"
    assert 0 <= made["metrics"]["accuracy"] <= 1
    stages = [
        json.loads(row)["stage"] for row in Path("tuned/metrics.jsonl").read_text().splitlines()
    ]
    assert stages == ["finetune"]
    assert sorted(path.name for path in here.iterdir()) == ["tuned"]


@pytest.mark.parametrize("kind", [bars._Lines, bars._Bars])
def test_work_inside_work_leaves_no_line(
    kind: type[Progress], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = kind()
    with progress.bar("train", 2) as outer:
        outer.advance(loss=0.5, accuracy=0.25)
        with progress.bar("evaluate", 1) as inner:
            inner.advance()
        outer.advance(loss=0.4, accuracy=0.5)

    err = capsys.readouterr().err
    assert "train" in err
    assert "loss 0.4  accuracy 50.00 %" in err
    assert "evaluate" not in err.splitlines()[-1]


def test_only_the_command_line_and_the_console_print() -> None:
    package = Path(nampruner.__file__).parent
    for path in package.rglob("*.py"):
        if not {"cli", "console"} & set(path.relative_to(package).parts):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w.])print\(|sys\.std(out|err)\b", text), path
