"""A checkpoint folder may come from anybody: what it must not get is refused with one message."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import ZOO, image, lively

from nampruner import models
from nampruner.checkpoint import load, save
from nampruner.checkpoint.guard import Frugal
from nampruner.errors import CheckpointError
from nampruner.nam import attach_nam
from nampruner.pruning import prune

Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = models.build("resnet20?width=8", num_classes=4, in_channels=3, image_size=16)
    attach_nam(model, image(size=16))
    slim = prune(lively(model).eval(), image(size=16), ratio=0.3, round_to=1).model
    return save(slim, tmp_path_factory.mktemp("made") / "good")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in made.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert len(message) < 600
    for word in words:
        assert word in message


def edit(folder: Path, change: Callable[[Any], Any]) -> None:
    path = folder / "nampruner.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def of_lineage(change: Callable[[Any], Any]) -> Damage:
    return lambda folder: edit(folder, lambda record: change(record["lineage"]))


def of_removed(
    change: Callable[[list[int]], list[int]], name: str = "layer1.0.conv1.weight"
) -> Damage:
    def apply(lineage: Any) -> None:
        dims = lineage["plans"][0]["removed"][name]
        dims["0"] = change(dims["0"])

    return of_lineage(apply)


def test_the_folder_is_good(folder: Path) -> None:
    load(folder)


# -- the record ------------------------------------------------------------------------------------


def text(body: str) -> Damage:
    return lambda folder: (folder / "nampruner.json").write_text(body)


BOMBS: dict[str, Damage] = {
    "deep lists": text("[" * 100_000),
    "deep objects": text('{"recipe":' * 50_000 + "1" + "}" * 50_000),
    "deep inside": text('{"lineage": {}, "recipe": {"a": ' + "[" * 5000 + "]" * 5000 + "}}"),
    "a number of many digits": of_lineage(lambda x: x["arguments"].update(num_classes=10**4000)),
    "a list for an object": text('{"lineage": []}'),
    "an object for a list": of_lineage(lambda x: x.update(plans={"a": 1})),
    "null for an object": text('{"lineage": null}'),
    "text for indices": of_lineage(
        lambda x: x["plans"][0]["removed"].update({"conv1.weight": {"0": "all"}})
    ),
    "a fraction for an index": of_removed(lambda gone: [0.5, *gone]),
    "not a number": of_lineage(lambda x: x["nam"][0].update(gain=float("nan"))),
    "two records": text('{"lineage": {}}{"lineage": {}}'),
    "no text at all": lambda f: (f / "nampruner.json").write_bytes(b"\x00\xff\xfe\x80"),
}


@pytest.mark.parametrize("damage", BOMBS.values(), ids=BOMBS)
def test_a_record_that_is_none(damage: Damage, folder: Path) -> None:
    damage(folder)
    refused(folder)


def test_a_record_of_any_length_is_not_read(folder: Path) -> None:
    with (folder / "nampruner.json").open("ab") as file:
        file.truncate(2**40)
    refused(folder, "too large")


# -- names and indices -----------------------------------------------------------------------------


def attribute(module: str, name: str, value: Any) -> Damage:
    return of_lineage(lambda x: x["attributes"].setdefault(module, {}).update({name: value}))


NAMES: dict[str, Damage] = {
    "a dunder": attribute("conv1", "__class__", 2),
    "a dict of the module": attribute("conv1", "_parameters", 2),
    "a method": attribute("conv1", "forward", 2),
    "a flag": attribute("conv1", "training", 1),
    "a new attribute": attribute("conv1", "other", 2),
    "a wider layer": attribute("conv1", "out_channels", 10**9),
    "a larger stride": attribute("conv1", "stride", [64, 64]),
    "a negative width": attribute("conv1", "groups", -1),
    "a tuple for a number": attribute("conv1", "groups", [1, 1]),
    "a longer tuple": attribute("conv1", "kernel_size", [1, 1, 1]),
    "another module": attribute("layer9", "groups", 1),
    "a path as a module": attribute("../../conv1", "groups", 1),
    "the parameters of a module": attribute("conv1.weight", "groups", 1),
    "NAM at a path": of_lineage(lambda x: x["nam"][0].update(module="../../etc")),
    "NAM twice": of_lineage(lambda x: x["nam"].append(x["nam"][0])),
    "a bias for a normalization": of_lineage(
        lambda x: x.update(biases=[{"module": "bn1", "after": 1}])
    ),
    "a bias for the network": of_lineage(lambda x: x.update(biases=[{"module": "", "after": 1}])),
    "a baked normalization": of_lineage(lambda x: x.update(baked=["bn1"])),
    "a baked network": of_lineage(lambda x: x["plans"][0].update(baked=[""])),
    "a cut of an attribute": of_lineage(
        lambda x: x["plans"][0]["removed"].update({"conv1.stride": {"0": [0]}})
    ),
    "a cut of a dunder": of_lineage(
        lambda x: x["plans"][0]["removed"].update({"__class__": {"0": [0]}})
    ),
    "a cut along no dimension": of_lineage(
        lambda x: x["plans"][0]["removed"].update({"conv1.weight": {"7": [0]}})
    ),
    "a cut along a negative dimension": of_lineage(
        lambda x: x["plans"][0]["removed"].update({"conv1.weight": {"-4": [0]}})
    ),
    "a frozen parameter": lambda f: edit(f, lambda r: r["kept"].update(frozen=["../x"])),
    "a cast of a module": lambda f: edit(f, lambda r: r["kept"].update(dtypes={"fc": "float16"})),
    "a cast of an integer": lambda f: edit(
        f, lambda r: r["kept"].update(dtypes={"bn1.num_batches_tracked": "float16"})
    ),
    "a tie with a method": lambda f: edit(
        f, lambda r: r["kept"].update(tied={"conv1.forward": "bn1.forward"})
    ),
    "a tie of other shapes": lambda f: edit(
        f, lambda r: r["kept"].update(tied={"conv1.weight": "bn1.weight"})
    ),
    "a layout of a vector": lambda f: edit(
        f, lambda r: r["kept"].update(channels_last=["bn1.weight"])
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", NAMES.values(), ids=NAMES)
def test_names_of_other_things(damage: Damage, folder: Path) -> None:
    damage(folder)
    refused(folder)


INDICES: dict[str, Damage] = {
    "out of range": of_removed(lambda gone: [*gone, 10**6]),
    "beyond 64 bits": of_removed(lambda gone: [*gone, 2**70]),
    "negative": of_removed(lambda gone: [-1, *gone]),
    "twice": of_removed(lambda gone: [gone[0], *gone]),
    "not in order": of_removed(lambda gone: gone[::-1]),
    "all": of_removed(lambda gone: list(range(8))),
    "millions": of_removed(lambda gone: list(range(2_000_000))),
    "none": of_removed(lambda gone: []),
}


@pytest.mark.parametrize("damage", INDICES.values(), ids=INDICES)
def test_indices_that_are_none(damage: Damage, folder: Path) -> None:
    damage(folder)
    refused(folder)


def test_an_index_that_the_knife_would_overlook(folder: Path) -> None:
    """Indices beyond the end change no shape, so the weights would still fit."""
    of_removed(lambda gone: [*gone, 8])(folder)
    refused(folder, "layer1.0.conv1.weight", "do not exist")


# -- the source ------------------------------------------------------------------------------------


def source(spec: str) -> Damage:
    return of_lineage(lambda x: x.update(source=spec))


def argument(**more: Any) -> Damage:
    return of_lineage(lambda x: x["arguments"].update(more))


ASKED: dict[str, tuple[Damage, str]] = {
    "a download": (source("timm:resnet10t?pretrained=true"), "would fetch"),
    "torchvision's download": (source("torchvision:resnet18?weights=DEFAULT"), "would fetch"),
    "a backbone": (source("torchvision:fcn_resnet50?weights_backbone=DEFAULT"), "would fetch"),
    "a file": (source("timm:resnet10t?checkpoint_path=/etc/passwd"), "would fetch"),
    "an address": (source("timm:resnet10t?pretrained_cfg={url: 'http://a'}"), "would fetch"),
    "another address": (
        source("timm:resnet10t?pretrained_cfg_overlay={file: /etc/passwd}"),
        "would fetch",
    ),
    "a file of YOLO's": (source("yolo:/etc/passwd.pt"), "would read weights"),
    "a cache": (source("timm:resnet10t?cache_dir=/tmp"), "would fetch"),
    "weights": (argument(weights="/etc/passwd"), "none that a network is built with"),
    "trust": (argument(trust_source=True), "none that a network is built with"),
    "another spec": (argument(spec="timm:resnet18"), "none that a network is built with"),
    "text for a size": (argument(num_classes="4"), "which is no size"),
    "a flag for a size": (argument(num_classes=True), "which is no size"),
    "a negative size": (argument(num_classes=-4), "which is no size"),
    "a hub": (source("timm:hf-hub:somebody/model"), "unknown model"),
    "a folder": (source("timm:local-dir:/etc"), "unknown model"),
    "nonsense": (source("timm:resnet10t?block_args=3&stem_width=[]"), ""),
    "an unheard-of library": (source("http://host/x"), "unknown model source"),
    "a command": (source("os:system?command=touch ran"), "would run code from os"),
    "a package": (source("this:s"), "would run code from this"),
    "a module of the library": (source("nampruner.checkpoint:save"), "would run code"),
    "a file of code": (source("trap.py:net"), "would run code from trap.py"),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_a_record_may_not_ask_for(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, words = ASKED[name]
    monkeypatch.chdir(folder)
    (folder / "trap.py").write_text("open('ran', 'w').close()")
    damage(folder)
    refused(folder, words)
    assert not (folder / "ran").exists()


SIZES: dict[str, Damage] = {
    "a wide network": source("resnet20?width=100000"),
    "many classes": argument(num_classes=10**10),
    "more than can be counted": argument(num_classes=10**30),
    "many channels": argument(in_channels=10**9),
    "a wide network of timm": source("timm:resnet10t?base_width=1000000"),
    "a large map": of_lineage(lambda x: x["nam"][0].update(height=10**6, width=10**6)),
    "many channels of NAM": of_lineage(lambda x: x["nam"][0].update(channels=10**12)),
    "a negative map": of_lineage(lambda x: x["nam"][0].update(height=-1)),
}


@pytest.mark.parametrize("damage", SIZES.values(), ids=SIZES)
def test_sizes_far_beyond_the_weights(damage: Damage, folder: Path) -> None:
    damage(folder)
    refused(folder)


def test_a_budget_of_memory_is_spent_before_memory_is() -> None:
    with Frugal(4000):
        nn.Linear(10, 10)
        with pytest.raises(ValueError, match="far larger than its weights"):
            torch.empty(10**15)
    with Frugal(70_000):
        torch.zeros(10_000)
        with pytest.raises(ValueError, match="far larger"):
            torch.zeros(10_000)
    with Frugal(1000), pytest.raises(ValueError, match="far larger"):
        torch.arange(10_000)


# -- the weights -----------------------------------------------------------------------------------


def header(**entries: Any) -> Damage:
    """Replace the header of the weights, and leave 16 bytes of data."""

    def apply(folder: Path) -> None:
        body = json.dumps(entries).encode()
        data = struct.pack("<Q", len(body)) + body + b"\0" * 16
        (folder / "model.safetensors").write_bytes(data)

    return apply


def tensor(shape: list[int], end: int = 16, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


def weights(change: Callable[[dict[str, Tensor]], Any]) -> Damage:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def poisoned(value: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors["layer2.0.conv1.weight"].view(-1)[3:4].fill_(value)


class Trap:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


BROKEN: dict[str, tuple[Damage, str]] = {
    "a huge shape": (header(**{"conv1.weight": tensor([10**6, 10**6, 3, 3])}), "damaged"),
    "a shape beyond 64 bits": (header(**{"conv1.weight": tensor([2**40, 2**40])}), "damaged"),
    "a negative shape": (header(**{"conv1.weight": tensor([-1, 4])}), "damaged"),
    "data beyond the end": (header(**{"conv1.weight": tensor([2**40], 2**42)}), "damaged"),
    "an unknown dtype": (header(**{"conv1.weight": tensor([4], dtype="Q9")}), "damaged"),
    "names that are paths": (header(**{"../../x": tensor([4])}), "missing: conv1.weight"),
    "a huge header": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
        "damaged",
    ),
    "cut short": (
        lambda f: os.truncate(
            f / "model.safetensors", (f / "model.safetensors").stat().st_size - 5
        ),
        "damaged",
    ),
    "a pickle": (lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(Trap())), "damaged"),
    "NaN": (weights(poisoned(float("nan"))), "not a number (NaN): layer2.0.conv1.weight"),
    "one too few": (weights(lambda w: w.pop("fc.bias")), "missing: fc.bias"),
    "a hundred too many": (
        weights(lambda w: w.update({f"x{n}": torch.zeros(1) for n in range(100)})),
        "(100 in all)",
    ),
    "integers": (weights(lambda w: w.update({"fc.bias": w["fc.bias"].int()})), "dtype: fc.bias"),
    "half": (weights(lambda w: w.update({"fc.bias": w["fc.bias"].half()})), "dtype: fc.bias"),
    "another shape": (
        weights(lambda w: w.update({"fc.bias": torch.zeros(5)})),
        "fc.bias [5] instead of [4]",
    ),
    "a scalar": (weights(lambda w: w.update({"fc.bias": torch.zeros(())})), "fc.bias [] instead"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_weights_that_are_none(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, words = BROKEN[name]
    monkeypatch.chdir(folder)
    damage(folder)
    refused(folder, words)
    assert not (folder / "ran").exists()


def test_infinity_is_a_number(folder: Path) -> None:
    """A mask may hold it."""
    weights(poisoned(float("inf")))(folder)
    assert load(folder).layer2[0].conv1.weight.isinf().any()


def test_nan_is_not_saved_either(tmp_path: Path) -> None:
    model = ZOO["chain"].make()
    model[4].running_var[2] = float("nan")
    with pytest.raises(CheckpointError, match=r"cannot be saved: not a number .*4\.running_var"):
        save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_one_tensor_with_two_values(tmp_path: Path) -> None:
    """Loaded one after the other, the last would win."""
    case = ZOO["tied_weights"]
    model = case.make()
    model.second.weight = nn.Parameter(model.first.weight.detach() + 1)
    folder = save(model, tmp_path / "x")
    with pytest.raises(CheckpointError, match="one tensor in the network"):
        load(folder, model=case.build())


# -- what is no file -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nampruner.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["loop", "device", "pipe", "folder", "dangling"])
def test_what_is_no_regular_file_is_not_read(kind: str, name: str, folder: Path) -> None:
    path = folder / name
    path.unlink()
    if kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.symlink_to(folder)
    else:
        path.symlink_to(folder / "nowhere")
    refused(folder, f"it has no {name}")


def test_links_to_files_are_followed_and_nothing_of_them_is_told(
    made: Path, folder: Path, tmp_path: Path
) -> None:
    """Hubs keep their files elsewhere and link to them."""
    path = folder / "model.safetensors"
    path.unlink()
    path.symlink_to(made / "model.safetensors")
    load(folder)
    secret = tmp_path / "secret"
    secret.write_text("open sesame")
    for name in ("model.safetensors", "nampruner.json"):
        (folder / name).unlink()
        (folder / name).symlink_to(secret)
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        assert "sesame" not in str(caught.value)


def test_a_record_that_names_one_module_over_and_over(folder: Path) -> None:
    """Refused at once, not looked up a hundred thousand times."""
    of_lineage(lambda x: x.update(nam=x["nam"][:1] * 100_000))(folder)
    refused(folder, "recorded twice")
