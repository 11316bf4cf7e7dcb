"""The whole way, interrupted and resumed; where results go, and whose folder it is."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import nampruner
from nampruner import checkpoint
from nampruner.cli import call
from nampruner.config import PruneCommand
from nampruner.errors import CheckpointError, NamPrunerError
from nampruner.pipeline import classifiers, folders, run, stages, whole
from nampruner.pipeline.commands import prune_command
from nampruner.plan import PruningPlan
from nampruner.progress import Silent
from nampruner.recipe import Recipe, read_recipe
from nampruner.results import RunResult

RECIPE = Recipe(
    model="resnet20?width=4",
    data="digits",
    epochs=2,
    lr=0.05,
    round_to=2,
    ratio=0.3,
    finetune_epochs=1,
    calibration=256,
)
FLAGS = (
    *("--model", "resnet20?width=4", "--data", "digits", "--epochs", "2", "--lr", "0.05"),
    *("--round-to", "2", "--ratio", "0.3", "--finetune-epochs", "1", "--calibration", "256"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = run(RECIPE, folder)
    torch.set_num_threads(threads)
    return folder, result


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return nampruner.load(folder).state_dict()


def test_a_run_leaves_everything_and_the_numbers_agree(finished: tuple[Path, RunResult]) -> None:
    folder, result = finished
    left = {path.name for path in folder.iterdir()}
    assert left == {
        *("dense", "pruned", "slim", "figures", "dense.onnx", "model.onnx", "plan.json"),
        *("recipe.yaml", "metrics.jsonl", "report.html", "result.json"),
    }
    assert read_recipe(folder / "recipe.yaml") == RECIPE
    assert RunResult.model_validate_json((folder / "result.json").read_text()) == result
    plan = PruningPlan.model_validate_json((folder / "plan.json").read_text())
    assert (plan.achieved, plan.requested) == (result.achieved, result.requested)
    slim, dense = nampruner.load(folder / "slim"), nampruner.load(folder / "dense")
    assert result.after.params == sum(p.numel() for p in slim.parameters())
    assert result.before.params == sum(p.numel() for p in dense.parameters())
    assert result.achieved.ratio == pytest.approx(0.3, abs=0.05)
    assert result.certificate.max_relative_error <= 1e-9
    assert result.onnx.parity.max_relative <= 1e-4
    assert result.onnx.parity.inputs == 64
    assert set(result.onnx.latency_ms) == {"dense", "slim"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    stages_seen = [(row["stage"], row["epoch"]) for row in rows]
    assert stages_seen == [("train", 1), ("train", 2), ("finetune", 1)]


def test_the_reported_accuracies_are_those_of_the_checkpoints(
    finished: tuple[Path, RunResult],
) -> None:
    folder, result = finished
    data = nampruner.load_data(RECIPE, seed=RECIPE.seed)

    def accuracy(name: str) -> float:
        model = nampruner.load(folder / name)
        right = seen = 0
        with torch.no_grad():
            for images, labels in data.test:
                right += int((model(images).argmax(1) == labels).sum())
                seen += len(labels)
        return right / seen

    assert result.before.accuracy == pytest.approx(accuracy("dense"))
    assert result.accuracy_recovered == pytest.approx(accuracy("pruned"))
    assert result.after.accuracy == pytest.approx(accuracy("slim"))


def test_the_parts_of_a_run_know_where_they_come_from(finished: tuple[Path, RunResult]) -> None:
    folder, _ = finished
    parents = {name: checkpoint.read(folder / name).parent for name in ("dense", "pruned", "slim")}
    assert parents == {"dense": None, "pruned": "../dense", "slim": "../pruned"}
    slim = whole.load(folder / "slim")
    assert stages.uncut_parent(slim) == (folder / "dense").resolve()


def test_a_finished_run_computes_nothing(
    finished: tuple[Path, RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a finished run computed something")

    monkeypatch.setattr(whole, "prepare", fail)
    assert run(RECIPE, folder) == result
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_another_recipe_in_the_folder_is_named(finished: tuple[Path, RunResult]) -> None:
    folder, _ = finished
    other = RECIPE.model_copy(update={"epochs": 7})
    with pytest.raises(NamPrunerError, match="epochs 2 there, 7 asked for"):
        run(other, folder)


def test_the_folder_is_named_after_the_recipe() -> None:
    name = folders.run_folder(RECIPE).name
    assert name.startswith("resnet20-digits-")
    assert len(name.removeprefix("resnet20-digits-")) == 8
    assert folders.run_folder(RECIPE.model_copy()) == folders.run_folder(RECIPE)
    others = {folders.run_folder(RECIPE.model_copy(update={"seed": n})) for n in range(1, 5)}
    assert len(others | {folders.run_folder(RECIPE)}) == 5
    model = RECIPE.model_copy(update={"model": "my/nets.py:small?width=4", "data": "/a/b c/"})
    assert folders.run_folder(model).name.startswith("nets.py_small-b_c-")


def test_the_same_from_the_recipe_file_and_the_flags(
    finished: tuple[Path, RunResult], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = finished
    for line in ([str(folder / "recipe.yaml")], FLAGS):
        line = ["run", *line, "--out", str(folder), "--allow-slower", "--json"]
        assert call(line) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown == json.loads(result.model_dump_json(exclude_none=True))
    assert call(["run", *FLAGS, "--out", str(folder), "--allow-slower"]) == 0
    out, err = capsys.readouterr()
    assert "is finished" in err
    assert all(
        label in out for label in ("test accuracy", "params", "MACs", "ONNX file", "latency")
    )


def test_a_run_that_is_not_faster_says_so_first_and_exits_with_two(
    finished: tuple[Path, RunResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = finished
    assert result.faster is not None
    assert result.before.latency
    slow = result.before.latency.model_copy(update={"turns_ms": (2.0,) * 5})
    fast = slow.model_copy(update={"turns_ms": (1.0,) * 5})
    for after, faster in ((fast, True), (slow, False)):
        columns = {
            "before": result.before.model_copy(update={"latency": slow}),
            "after": result.after.model_copy(update={"latency": after}),
        }
        told = result.model_copy(update={**columns, "faster": faster})
        copied = tmp_path / str(faster)
        copied.mkdir()
        (copied / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
        (copied / "result.json").write_text(told.model_dump_json())
        line = ["run", *FLAGS, "--out", str(copied)]

        assert call(line) == (0 if faster else 2)
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith("The slim network is not faster") is not faster
        assert call([*line, "--allow-slower", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["faster"] is faster


# Each kills the process at its worst moment: state written, weights half written, record missing …
KILLERS = {
    "training": """
from nampruner.training.resume import Memory
save = Memory.save
def dying(*arguments):
    save(*arguments)
    die()
Memory.save = dying
""",
    "weights": """
from nampruner import checkpoint
save = checkpoint.save_model
def dying(model, path):
    save(model, path)
    with open(path, "r+b") as file:
        file.truncate(5000)
    die()
checkpoint.save_model = dying
""",
    "record": """
from pathlib import Path
write = Path.write_text
def dying(path, text, **options):
    if path.name == "nampruner.json" and ".pruned." in str(path):
        write(path, text[: len(text) // 2], **options)
        die()
    return write(path, text, **options)
Path.write_text = dying
""",
}
LIVE = """
import os, signal, sys
import torch
torch.set_num_threads(1)
def die(): os.kill(os.getpid(), signal.SIGKILL)
{killer}
from nampruner.cli import call
sys.exit(call(sys.argv[1:]))
"""


def loadable(folder: Path) -> list[Path]:
    """Return every folder, hidden ones too, that loads as a checkpoint."""
    found = []
    for path in folder.rglob("*"):
        if path.is_dir():
            try:
                nampruner.load(path)
            except CheckpointError:
                continue
            found.append(path)
    return sorted(found)


def test_a_killed_run_goes_on_and_ends_the_same(
    finished: tuple[Path, RunResult], tmp_path: Path
) -> None:
    undisturbed, expected = finished
    folder = tmp_path / "again"
    line = ["run", *FLAGS, "--out", str(folder), "--allow-slower", "--json"]

    def go(killer: str) -> subprocess.CompletedProcess[str]:
        code = LIVE.format(killer=killer)
        return subprocess.run(
            [sys.executable, "-c", code, *line], capture_output=True, text=True, check=False
        )

    whole_then: dict[str, list[str]] = {"training": [], "weights": [], "record": ["dense"]}
    for moment, killer in KILLERS.items():
        done = go(killer)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert [path.name for path in loadable(folder)] == whole_then[moment]

    done = go("")
    assert done.returncode == 0, done.stderr
    result: Any = json.loads(done.stdout)
    assert result["after"]["accuracy"] == expected.after.accuracy
    assert result["achieved"] == expected.achieved.model_dump(exclude_none=True)
    for name in ("dense", "slim"):
        ours, theirs = weights(folder / name), weights(undisturbed / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert not list(folder.rglob(".*"))


def test_prune_takes_the_newest_checkpoint_never_pruned(
    finished: tuple[Path, RunResult],
) -> None:
    folder, _ = finished
    for name in ("dense", "pruned", "slim"):
        os.utime(folder / name / "nampruner.json", (1, 1 if name == "dense" else 2))
    assert folders.newest(folder.parent) == folder / "dense"


def test_prune_without_a_checkpoint_trains_one_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classifiers, "fit", lambda *_, **__: None)
    assert folders.newest(Path("runs")) is None

    line = ["prune", "--ratio", "0.3", "--data", "digits", "--calibration", "128", "--json"]
    assert call(line) == 0
    out, err = capsys.readouterr()

    assert "training one of the default first" in err
    made = Path(json.loads(out)["checkpoint"])
    assert made.name == "dense-ratio0.3"
    assert checkpoint.read(made).parent == "../dense"
    assert checkpoint.read(made.with_name("dense")).lineage.plans == ()


def test_no_recover_shows_what_would_have_been(
    finished: tuple[Path, RunResult], tmp_path: Path
) -> None:
    folder, _ = finished
    found = {
        recover: prune_command(
            folder / "dense",
            PruneCommand(ratio=0.4, recover=recover),
            tmp_path / f"recover-{recover}",
            trust=False,
            progress=Silent(),
        )
        for recover in (True, False)
    }
    plain, recovered = found[False].certificate, found[True].certificate
    assert plain.output_error_recovered is None
    assert plain.output_error_cut == pytest.approx(recovered.output_error_cut)
    assert recovered.output_error_recovered is not None
    assert recovered.output_error_cut is not None
    assert recovered.output_error_recovered < recovered.output_error_cut


def test_a_cut_can_be_cut_again_and_reported(
    finished: tuple[Path, RunResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    again = tmp_path / "again"
    assert call(["prune", str(folder / "slim"), "--macs", "60%", "--out", str(again)]) == 0
    record = checkpoint.read(again)
    assert len(record.lineage.plans) == 2
    assert record.lineage.plans[-1].requested.macs == "60%"
    assert record.lineage.plans[-1].before.params == record.lineage.plans[0].after.params
    assert stages.uncut_parent(whole.load(again)) == (folder / "slim").resolve()

    page = tmp_path / "page" / "cut.html"
    assert call(["report", str(again), "--out", str(page)]) == 0
    assert "Requested MACs 60%" in page.read_text()
    assert (page.parent / "figures" / "widths.png").is_file()
    capsys.readouterr()
