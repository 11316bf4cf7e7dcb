"""YOLO from the command line: the whole way and every stage, like any other network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from boxes import SIZE, boxes, formula, tiny

import nampruner
from nampruner import yolo
from nampruner.cli import call
from nampruner.pipeline import job, stages
from nampruner.pipeline.task import open_task
from nampruner.recipe import Recipe, read_recipe
from nampruner.yolo.files import packed

SHORT = (
    *("--image-size", str(SIZE), "--batch-size", "4", "--workers", "0"),
    *("--yolo-args", "mosaic=0", "--yolo-args", "warmup_epochs=0", "--yolo-args", "nbs=4"),
)
"""Without what makes long training better, and short training impossible."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return boxes(tmp_path_factory.mktemp("boxes"))


@pytest.fixture(scope="module")
def line(data: Path) -> list[str]:
    model = ["--model", f"yolo:{tiny(data.parent)}", "--data", str(data), *SHORT]
    return [*model, "--strength", "1e-3", "--yolo-args", "val=False", "--epochs"]


@pytest.fixture(scope="module")
def finished(line: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    more = ["--ratio", "0.2", "--round-to", "4", "--finetune-epochs", "1", "--finetune-lr", "1e-4"]
    assert call(["run", *line, "30", *more, "--out", str(out), "--allow-slower"]) == 0
    return out


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command and return the JSON object that it prints."""
    capsys.readouterr()
    assert call([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_leaves_what_every_run_leaves_and_the_numbers_agree(
    finished: Path, data: Path
) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("dense", "pruned", "slim", "figures", "dense.onnx", "model.onnx", "plan.json"),
        *("recipe.yaml", "metrics.jsonl", "report.html", "result.json"),
    }
    result = json.loads((finished / "result.json").read_text())
    assert result["before"]["metrics"]["mAP50"] > 0.5
    given = {"imgsz": SIZE, "batch": 4, "device": "cpu"}
    for folder, found in (
        ("dense", result["before"]["metrics"]),
        ("pruned", result["metrics_recovered"]),
        ("slim", result["after"]["metrics"]),
    ):
        model = yolo.load(finished / folder)
        own = yolo.validate(model, data, **given)
        assert found == {
            "mAP50": own["metrics/mAP50(B)"],
            "mAP50-95": own["metrics/mAP50-95(B)"],
        }
    assert result["after"]["params"] == sum(p.numel() for p in model.parameters())
    assert result["achieved"]["ratio"] == pytest.approx(0.2, abs=0.05)
    assert result["certificate"]["max_relative_error"] <= 1e-9
    assert result["onnx"]["parity"]["top1_agreement"] is None
    assert result["onnx"]["parity"]["max_relative"] <= 1e-4
    found = result["onnx"]["parity"]["boxes"]
    assert found["boxes"] > 0
    assert found["pairs"] >= found["boxes"] - found["ties"]
    assert model.names == {0: "red", 1: "green", 2: "blue"}
    rows = [json.loads(row) for row in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == ["train"] * 30 + ["finetune"]
    assert rows[-2]["loss"] < rows[0]["loss"]


def test_the_table_and_the_report_speak_of_its_own_measures(
    finished: Path, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(finished / "recipe.yaml")
    assert call(["run", recipe, "--out", str(finished), "--allow-slower"]) == 0
    text = capsys.readouterr().out
    assert "mAP50-95" in text
    assert "accuracy" not in text
    page = (finished / "report.html").read_text()
    assert "of mAP50" in page
    assert "ultralytics" in page
    assert read_recipe(finished / "recipe.yaml").nam == "channel"


def test_a_checkpoint_and_its_onnx_file_are_judged_alike(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [
        shown(["evaluate", str(finished / name)], capsys)["metrics"]
        for name in ("slim", "model.onnx")
    ]
    assert found[0]["mAP50"] > 0
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_plain_ultralytics_runs_the_onnx_file(finished: Path, data: Path) -> None:
    from ultralytics import YOLO

    image = data.parent / "images" / "val" / "0.png"
    (theirs,) = YOLO(finished / "model.onnx", task="detect")(
        image, imgsz=SIZE, verbose=False, conf=0.05
    )
    assert theirs.names == {0: "red", 1: "green", 2: "blue"}
    ours = yolo.load(finished / "slim")
    batch = yolo.images(ours, image, image_size=SIZE)[0]
    with torch.no_grad():
        most = ours(batch)[0][0, 4:].max()
    assert len(theirs) > 0
    assert float(theirs.boxes.conf.max()) == pytest.approx(float(most), abs=1e-3)


def test_a_pt_of_ultralytics_goes_through_every_stage(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = yolo.save(yolo.load(finished / "dense"), tmp_path / "best.pt")
    dense = str(best)
    options = ["--data", str(data), *SHORT[:6], "--round-to", "4"]
    assert shown(["rank", dense, *options], capsys)["would_be"][2]["macs"] < 1
    result = shown(["prune", dense, *options, "--ratio", "0.3"], capsys)
    slim = tmp_path / "best-ratio0.3"
    assert result["checkpoint"] == str(slim)
    assert 0 < result["achieved"]["ratio"] <= 0.3
    assert set(result["before"]["metrics"]) == {"mAP50", "mAP50-95"}
    assert call(["finetune", str(slim), "--finetune-epochs", "1", "--json"]) == 0
    streams = capsys.readouterr()
    assert "finetune   done" in streams.err
    assert "train " not in streams.err
    tuned = json.loads(streams.out)
    assert tuned["metrics"]["mAP50_dense"] == result["before"]["metrics"]["mAP50"]
    assert Path(tuned["checkpoint"]).name == "best-ratio0.3-finetuned"
    assert stages.uncut_parent(job.load(Path(tuned["checkpoint"]))) == best
    assert not list(tmp_path.glob(".*"))
    for source in (dense, tuned["checkpoint"]):
        out = str(tmp_path / "m.onnx")
        exported = shown(["export", source, *options[:4], "--out", out], capsys)
        assert exported["parity"]["boxes"]["worst_iou"] > 0.99
    pair = shown(["bench", dense, tuned["checkpoint"], "--rounds", "2"], capsys)["candidates"]
    assert [Path(each["path"]).name for each in pair] == [best.name, f"{slim.name}-finetuned"]
    assert pair[1]["size_bytes"] < pair[0]["size_bytes"]


def test_a_target_in_time_is_that_of_the_exported_detector(
    finished: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    formula(monkeypatch, tmp_path)
    dense = yolo.load(finished / "dense")
    best = str(yolo.save(dense, tmp_path / "best.pt"))
    options = ["--data", str(data), *SHORT[:6]]

    result = shown(["prune", best, *options, "--latency", "60%"], capsys)

    slim = yolo.load(result["checkpoint"])
    sizes = [sum(p.numel() for p in model.parameters()) for model in (dense, slim)]
    assert result["achieved"]["latency"] == pytest.approx(sizes[1] / sizes[0], rel=0.1)
    assert result["achieved"]["latency"] == pytest.approx(0.6, rel=0.1)
    images = yolo.images(dense, data, image_size=SIZE)
    pruned = nampruner.prune(dense, images[0], forward=yolo.forward, latency="60%")
    assert pruned.plan.achieved.latency == pytest.approx(0.6, rel=0.1)

    steps = shown(["rank", best, *options, "--latency"], capsys)
    assert sum(row["share"] for row in steps["times"]) == pytest.approx(1.0, abs=0.2)
    planned = shown(
        ["prune", best, *options, "--macs", "50%", "--round-to", "auto", "--dry-run"], capsys
    )
    assert planned["achieved"]["macs"] < 0.6


def test_a_broken_off_training_goes_on(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nampruner.yolo import trainers

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    kept = trainers.attach_penalty

    def attach(trainer: Any) -> None:
        kept(trainer)
        trainer.add_callback("on_model_save", stop)

    out = tmp_path / "dense"
    train = ["train", *line, "3", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(trainers, "attach_penalty", attach)
        assert call(train) == 130
    (last,) = tmp_path.rglob("last.pt")
    assert checkpoint_epochs(last) == 0
    assert call(train) == 0
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def checkpoint_epochs(last: Path) -> int:
    """Return the number of the last epoch that a `.pt` saw."""
    entry = torch.load(last, weights_only=False, map_location="cpu")
    return int(entry["epoch"])


def test_a_training_that_was_finished_is_not_made_twice(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ["train", *line, "1", "--out", str(tmp_path / "dense")]
    with monkeypatch.context() as patch:
        patch.setattr(stages, "keep", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call(train) == 130
    monkeypatch.setattr("nampruner.yolo.fit", None)
    assert call(train) == 0


def test_defaults_are_those_of_its_kind() -> None:
    recipe = Recipe(model="yolo:yolov8n.yaml", lr=0.5)
    assert (recipe.nam, recipe.image_size, recipe.epochs, recipe.lr) == ("channel", 640, 100, 0.5)
    assert Recipe().nam == "both"


@pytest.mark.parametrize("scale", "nsmlx")
def test_every_scale_has_its_nam_rows(scale: str, data: Path) -> None:
    recipe = Recipe(model=f"yolo:yolov8{scale}-nam.yaml", data=str(data), image_size=SIZE)
    model = open_task(recipe, trust=False).build()
    from nampruner.nam import nam_modules

    assert len(nam_modules(model)) == 3
    widths = {"n": 64, "s": 128, "m": 192, "l": 256, "x": 320}
    assert next(iter(nam_modules(model).values())).bn.num_features == widths[scale]


def test_a_network_with_nam_of_its_own_gets_no_more(data: Path) -> None:
    found = {}
    for name in ("yolov8n-nam.yaml", "yolov8n.yaml"):
        recipe = Recipe(model=f"yolo:{name}", data=str(data), image_size=SIZE)
        found[name] = len(nampruner.lineage.lineage(job.build(job.prepare(recipe))).nam)
    assert found["yolov8n-nam.yaml"] == 0
    assert found["yolov8n.yaml"] > 0


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no data": (["--data", "mnist5k"], "give a data YAML"),
    "data of another kind": (["--model", "yolo:yolov8n-cls.yaml"], "for classify; give --data"),
    "unknown argument": (["--yolo-args", "mosiac=0"], "Did you mean mosaic"),
    "argument with an option": (["--yolo-args", "imgsz=64"], "give --image-size"),
    "no value": (["--yolo-args", "mosaic"], "write NAME=VALUE"),
    "spatial NAM": (["--nam", "both"], "give channel or none"),
    "size": (["--image-size", "72"], "multiples of 32"),
    "smoothing": (["--label-smoothing", "0.1"], "has none"),
    "precision": (["--precision", "bf16"], "fp16 or no"),
    "taylor": (["--importance", "taylor"], "needs the loss of a classifier"),
    "name": (["--model", "yolo:yolov8q.yaml"], "Did you mean yolov8"),
    "for another kind": (["--model", "resnet20", "--data", "digits"], "--yolo-args is for"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_writes_nothing(
    mistake: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, message = MISTAKES[mistake]
    base = ["--model", "yolo:yolov8n.yaml", "--data", str(data), *SHORT]
    names = set(given[::2]) - {"--yolo-args"}
    kept = [
        w for pair in zip(base[::2], base[1::2], strict=True) if pair[0] not in names for w in pair
    ]
    out = tmp_path / "out"
    assert call(["run", *kept, *given, "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1
    assert message in err
    assert not out.exists()


def test_a_pt_for_other_data_fused_or_quantized_is_refused(
    finished: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = yolo.load(finished / "dense")
    other = tmp_path / "other.yaml"
    other.write_text(data.read_text().replace(", blue]", "]"))
    best = yolo.save(model, tmp_path / "best.pt")
    quantized = tmp_path / "quantized.pt"
    torch.save({"model": packed(model), "modelopt": {"modelopt": 1}}, quantized)
    fused = yolo.save(model.fuse(verbose=False), tmp_path / "fused.pt")  # type: ignore[operator]
    for file, where, message in (
        (best, other, "has 3 classes, the data 2"),
        (fused, data, "is fused"),
        (quantized, data, "is quantized"),
        (tmp_path / "gone.pt", data, "there is no such"),
    ):
        assert call(["prune", str(file), "--data", str(where), "--ratio", "0.3"]) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*-ratio*"))


def test_without_ultralytics_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    for name in [
        name for name in sys.modules if name.startswith(("ultralytics", "nampruner.yolo"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "nampruner.pipeline.yolo", raising=False)
    monkeypatch.delattr("nampruner.yolo", raising=False)
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    assert call(["run", "--model", "yolo:yolov8n.yaml", "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'nampruner[yolo]'" in capsys.readouterr().err
