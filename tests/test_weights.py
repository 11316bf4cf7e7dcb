"""Weights from anybody's file: fitted by name, or refused by name; code in them never runs."""

import argparse
import json
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from zoo import ZOO, image, lively

import nampruner
from nampruner.cli import call
from nampruner.errors import NamPrunerError
from nampruner.lineage import lineage
from nampruner.models import build, load_weights, read_weights

State = dict[str, Tensor]
FACTS = {"num_classes": 4, "in_channels": 1, "image_size": 8}


def fresh(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return build("resnet20?width=4", **FACTS)


def state() -> State:
    return {name: t.clone() for name, t in lively(fresh(0)).state_dict().items()}


def holds(model: nn.Module, wanted: State) -> bool:
    found = model.state_dict()
    return all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


WRAPPED: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "ordered": OrderedDict,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}},
    "model_state": lambda s: {"model_state": s},
    "ema alone": lambda s: {"ema": s, "step": 1},
    "ema inside": lambda s: {"state_dict_ema": {"module": s}},
    "module.": lambda s: {f"module.{name}": t for name, t in s.items()},
    "compiled and parallel": lambda s: {f"module._orig_mod.{name}": t for name, t in s.items()},
    "Lightning": lambda s: {"state_dict": {f"model.{name}": t for name, t in s.items()}},
    "timm's options": lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1)},
    "parameters": lambda s: {
        n: nn.Parameter(t) if t.is_floating_point() else t for n, t in s.items()
    },
    "without counters": lambda s: {n: t for n, t in s.items() if "num_batches" not in n},
    "with extra state": lambda s: {**s, "fc._extra_state": None},
    "in half precision": lambda s: {
        n: t.half().float().half() if t.is_floating_point() else t for n, t in s.items()
    },
}


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_state_dicts_as_people_save_them(
    wrap: Callable[[State], Any], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"w{suffix}"
    torch.save(wrap(state()), path)
    model = fresh()
    assert not holds(model, state())
    load_weights(model, path)
    wanted = state()
    if wrap is WRAPPED["in half precision"]:
        wanted = {n: t.half().float() if t.is_floating_point() else t for n, t in wanted.items()}
    if wrap is WRAPPED["without counters"]:
        wanted = {n: t for n, t in wanted.items() if "num_batches" not in n}
    assert holds(model, wanted)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_safetensors_and_the_old_format(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    torch.save(state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("w.safetensors", "old.pth"):
        assert holds(build("resnet20?width=4", **FACTS, weights=tmp_path / name), state())


def test_the_networks_own_weights_go_before_the_average(tmp_path: Path) -> None:
    path = tmp_path / "both.pt"
    averaged = {name: t * 2 for name, t in state().items()}
    torch.save({"ema": averaged, "model": state()}, path)
    model = fresh()
    with pytest.warns(UserWarning, match="holds model, ema: model is used"):
        load_weights(model, path)
    assert holds(model, state())


def test_a_network_whose_own_names_begin_like_a_wrapper(tmp_path: Path) -> None:
    model = nn.ModuleDict({"model": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    wanted = {name: torch.rand_like(t) for name, t in model.state_dict().items()}
    torch.save(wanted, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert holds(model, wanted)


def test_shared_tensors_under_one_name_or_both(tmp_path: Path) -> None:
    wanted = ZOO["tied_weights"].make().state_dict()
    torch.save(wanted, tmp_path / "both.pt")
    torch.save({n: t for n, t in wanted.items() if n != "second.weight"}, tmp_path / "one.pt")
    for name in ("both.pt", "one.pt"):
        model = ZOO["tied_weights"].build()
        load_weights(model, tmp_path / name)
        assert model.first.weight is model.second.weight
        assert holds(model, wanted)
    torch.save({**wanted, "second.weight": wanted["second.weight"] + 1}, tmp_path / "two.pt")
    with pytest.raises(NamPrunerError, match=r"first\.weight and second\.weight are one tensor"):
        load_weights(ZOO["tied_weights"].build(), tmp_path / "two.pt")


# -- what does not fit -----------------------------------------------------------------------------


def test_every_misfit_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    other = state()
    other["fc.weight"], other["fc.bias"] = torch.zeros(10, 16), torch.zeros(10)
    other |= {f"head.{n}": torch.zeros(1) for n in range(5)}
    del other["conv1.weight"]
    torch.save(other, path)
    model, before = fresh(), fresh().state_dict()
    with pytest.raises(NamPrunerError) as caught:
        load_weights(model, path)
    message = str(caught.value)
    for words in (
        "missing: conv1.weight;",
        "unknown: head.0, head.1, head.2, … (5 in all);",
        "fc.weight [10, 16] instead of [4, 16], fc.bias [10] instead of [4]",
        "number of classes",
        "--no-weights-strict",
    ):
        assert words in message
    assert holds(model, before)


def test_what_does_not_fit_may_stay_as_it_was_built(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    other = {**state(), "fc.weight": torch.zeros(10, 16), "fc.bias": torch.zeros(10)}
    torch.save(other, path)
    model, head = fresh(), fresh().fc.weight
    assert load_weights(model, path, strict=False) == ("fc.weight", "fc.bias")
    assert torch.equal(model.fc.weight, head)
    assert torch.equal(model.conv1.weight, state()["conv1.weight"])
    torch.save({"nothing": torch.zeros(1)}, path)
    with pytest.raises(NamPrunerError, match=r"do not fit ResNet.*unknown: nothing"):
        load_weights(model, path, strict=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t * float("nan"), r"not a number \(NaN\): bn1.weight"),
        (lambda t: t.int(), "another kind of number: bn1.weight"),
    ],
    ids=["nan", "integers"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_values_that_are_none(
    change: Callable[[Tensor], Tensor], words: str, strict: bool, tmp_path: Path
) -> None:
    torch.save({**state(), "bn1.weight": change(state()["bn1.weight"])}, tmp_path / "w.pt")
    with pytest.raises(NamPrunerError, match=words):
        load_weights(fresh(), tmp_path / "w.pt", strict=strict)


# -- files -----------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def pickled(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def scripted(path: Path) -> None:
    with warnings.catch_warnings():
        # TorchScript is deprecated; files of it are not gone
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def cut_short(path: Path) -> None:
    torch.save(state(), path)
    os.truncate(path, path.stat().st_size // 2)


FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("w.pt", lambda path: None, "there is no such file"),
    "a folder": ("w.pt", lambda path: path.mkdir(), "there is no such file"),
    "another kind": ("w.h5", lambda path: path.write_text(""), "must end in .safetensors"),
    "empty": ("w.pt", lambda path: path.write_bytes(b""), "damaged"),
    "text": ("w.pth", lambda path: path.write_text("hello"), "w.pth: "),
    "cut short": ("w.pt", cut_short, "damaged"),
    "no safetensors": ("w.safetensors", lambda path: path.write_bytes(b"x" * 99), "damaged"),
    "a whole model": ("w.pt", pickled(nn.Linear(2, 2)), "torch.save(model.state_dict()"),
    "a command": ("w.pt", pickled({"state_dict": Trap()}), "would run code"),
    "a program": ("w.pt", scripted, "reading it would run code"),
    "a number": ("w.pt", pickled(3), "no state dict in it (int)"),
    "a list": ("w.pt", pickled([torch.zeros(1)]), "no state dict in it (list)"),
    "an optimizer": ("w.pt", pickled({"optimizer": {}, "epoch": 1}), "(optimizer, epoch)"),
    "nothing": ("w.pt", pickled({}), "no state dict in it"),
    "wrapped without end": (
        "w.pt",
        pickled({"model": {"model": {"model": {"model": {"model": {}}}}}}),
        "no state dict in it",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write, words = FILES[name]
    monkeypatch.chdir(tmp_path)
    write(Path(file))
    with pytest.raises(NamPrunerError, match=re.escape(words)) as caught:
        read_weights(file)
    assert len(str(caught.value)) < 400
    assert not Path("ran").exists()


# -- the checkpoint --------------------------------------------------------------------------------


def test_a_checkpoint_does_not_need_the_file_again(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(state(), path)
    model = build("resnet20?width=4", **FACTS, weights=path).eval()
    assert lineage(model).source == "resnet20?width=4"
    assert "weights" not in lineage(model).arguments
    folder = nampruner.save(model, tmp_path / "dense")
    path.unlink()
    again = nampruner.load(folder)
    assert torch.equal(again(image(1)), model(image(1)))


FLAGS = (
    *("train", "--model", "resnet20?width=4", "--data", "digits", "--epochs", "1"),
    *("--nam", "none", "--out", "dense", "--json"),
)


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    donor = build("resnet20?width=4", num_classes=4, in_channels=1, image_size=8)
    torch.save({"state_dict": donor.state_dict()}, "w.pth")
    assert call([*FLAGS, "--weights", "w.pth"]) == 2
    assert "fc.weight [4, 16] instead of [10, 16]" in capsys.readouterr().err
    assert not Path("dense").exists()
    # so small a rate leaves the weights where the file put them
    more = ("--weights", "w.pth", "--no-weights-strict", "--lr", "1e-9", "--strength", "0")
    assert call([*FLAGS, *more]) == 0
    told = capsys.readouterr()
    assert "not in w.pth, so as it was built: fc.weight, fc.bias" in told.err
    assert json.loads(told.out)["checkpoint"] == "dense"
    Path("w.pth").unlink()
    found = nampruner.load("dense").state_dict()
    assert torch.allclose(found["conv1.weight"], donor.conv1.weight, atol=1e-6)
