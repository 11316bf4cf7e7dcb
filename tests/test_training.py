"""The loop against a plain PyTorch one; deterministic, resumable, and leaving no trace."""

import copy
import json
import math
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from nampruner.data import Data, load_data
from nampruner.errors import NamPrunerError
from nampruner.penalty import SparsityPenalty
from nampruner.recipe import Recipe
from nampruner.training import FitSettings, check_match, evaluate, fit, resolve_device


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(Recipe(data="digits"), seed=0)


def settings(**changes: Any) -> FitSettings:
    recipe = Recipe(device="cpu")
    return FitSettings.sparse(recipe, recipe).model_copy(update={"epochs": 2, **changes})


def small(seed: int = 0, classes: int = 10, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(64, classes)),
    )


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


class Recorder:
    """A progress that remembers, and breaks off at one step as a killed process would."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.notes: list[str] = []
        self.bars: dict[str, int] = {}
        self.steps: list[dict[str, float]] = []

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator["Recorder"]:
        self.bars[name] = total
        yield self

    def advance(self, **numbers: float) -> None:
        self.steps.append(numbers)
        if len(self.steps) == self.stop_at:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_settings_follow_the_options() -> None:
    recipe = Recipe(epochs=4, lr=0.3, momentum=0.8, finetune_epochs=2, finetune_lr=0.01, seed=7)
    sparse = FitSettings.sparse(recipe, recipe)
    tuned = FitSettings.finetuning(recipe, recipe, recipe)
    assert (sparse.stage, sparse.epochs, sparse.lr, sparse.seed) == ("train", 4, 0.3, 7)
    assert (tuned.stage, tuned.epochs, tuned.lr) == ("finetune", 2, 0.01)
    differing = {name for name, value in sparse if getattr(tuned, name) != value}
    assert differing == {"stage", "epochs", "lr"}


def test_it_learns_and_reports(digits: Data, tmp_path: Path) -> None:
    model, progress = small(), Recorder()
    history = fit(model, digits, settings(epochs=4), folder=tmp_path, progress=progress)
    assert [row.epoch for row in history.epochs] == [1, 2, 3, 4]
    last = history.epochs[-1]
    assert last.validation_accuracy == evaluate(model, digits.validation).accuracy
    assert last.validation_accuracy > 0.8
    assert last.loss < history.epochs[0].loss
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row.model_dump() for row in history.epochs]
    assert progress.bars == {"train": 4 * len(digits.train)}
    assert len(progress.steps) == 4 * len(digits.train)
    assert set(progress.steps[0]) == {"loss", "accuracy"}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def fixed_data(batch: int = 10, count: int = 60, poison: int | None = None) -> Data:
    """Unshuffled, not augmented, so that a plain loop can repeat it."""
    torch.manual_seed(5)
    images, labels = torch.randn(count, 1, 8, 8), torch.arange(count) % 3
    if poison is not None:
        images[poison] = math.nan
    sound = DataLoader(TensorDataset(images[:9], labels[:9]), 9)
    train = DataLoader(TensorDataset(images, labels), batch)
    return Data.from_loaders(train, sound, sound, name="fixed")


def plain_loop(model: nn.Module, data: Data, chosen: FitSettings) -> None:
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "weight_decay": chosen.weight_decay}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, 1.0, momentum=chosen.momentum, nesterov=True)
    total = chosen.epochs * len(data.train)
    schedule = OneCycleLR(optimizer, chosen.lr, total_steps=total, cycle_momentum=False)
    for _ in range(chosen.epochs):
        for images, labels in data.train:
            logs = F.log_softmax(model(images), dim=1)
            share = chosen.label_smoothing
            right = logs.gather(1, labels[:, None])[:, 0]
            loss = -((1 - share) * right + share * logs.mean(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def test_it_is_the_plain_loop() -> None:
    data, chosen = fixed_data(), settings(epochs=3, lr=0.1, weight_decay=0.1)
    ours, theirs = small(classes=3).double(), small(classes=3).double()
    data = as_double(data)
    fit(ours, data, chosen)
    plain_loop(theirs, data, chosen)
    assert not same_weights(ours, small(classes=3).double())
    for (name, one), other in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=name)


def as_double(data: Data) -> Data:
    def double(loader: Any) -> Any:
        images, labels = loader.dataset.tensors
        return DataLoader(TensorDataset(images.double(), labels), loader.batch_size)

    parts = (double(part) for part in (data.train, data.validation, data.test))
    return Data.from_loaders(*parts, name=data.name)


def test_the_seed_decides_and_the_callers_chance_is_left_alone(digits: Data) -> None:
    models = [small(dropout=0.2) for _ in range(3)]
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    fit(models[0], digits, settings())
    assert expected == (torch.rand(1), random.random(), np.random.rand())
    fit(models[1], digits, settings())
    assert same_weights(models[0], models[1])
    fit(models[2], digits, settings(seed=1))
    assert not same_weights(models[0], models[2])


@pytest.mark.parametrize("stop_at", [3, 14, 22, 30])
def test_broken_off_and_resumed_is_bit_equal(digits: Data, tmp_path: Path, stop_at: int) -> None:
    """Steps 3, 14 and 30 lie within an epoch of 11 steps, 22 ends one before it is kept."""

    def train(folder: Path, progress: Recorder) -> tuple[nn.Module, Any]:
        model = small(dropout=0.2)
        penalty = SparsityPenalty(model, 0.2, warmup_steps=25)
        chosen = settings(epochs=3)
        history = fit(model, digits, chosen, penalty=penalty, folder=folder, progress=progress)
        return model, [row.model_dump(exclude={"seconds"}) for row in history.epochs]

    whole, expected = train(tmp_path / "whole", Recorder())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", Recorder(stop_at))
    again = Recorder()
    resumed, rows = train(tmp_path / "broken", again)
    done = (stop_at - 1) // len(digits.train)
    assert again.bars["train"] == (3 - done) * len(digits.train)
    assert same_weights(whole, resumed)
    assert rows == expected
    assert rows[-1]["zeros"] > 0
    assert rows[-1]["factors"] == 24
    lines = (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["metrics.jsonl"]


def broken_off(digits: Data, folder: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        fit(small(), digits, settings(), folder=folder, progress=Recorder(stop_at=12))
    return folder / "train.unfinished.pt"


def test_other_settings_begin_anew_and_say_so(digits: Data, tmp_path: Path) -> None:
    broken_off(digits, tmp_path)
    changed, fresh, progress = small(), small(), Recorder()
    fit(changed, digits, settings(lr=0.1), folder=tmp_path, progress=progress)
    assert "another lr; beginning anew" in progress.notes[0]
    fit(fresh, digits, settings(lr=0.1))
    assert same_weights(changed, fresh)


def test_a_damaged_state_begins_anew_and_says_so(digits: Data, tmp_path: Path) -> None:
    state = broken_off(digits, tmp_path)
    state.write_bytes(state.read_bytes()[:1000])
    model, fresh, progress = small(), small(), Recorder()
    fit(model, digits, settings(), folder=tmp_path, progress=progress)
    assert "cannot be read" in progress.notes[0]
    fit(fresh, digits, settings())
    assert same_weights(model, fresh)


def test_stages_share_the_metrics_file(digits: Data, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "prune", "accuracy": 0.5}\n')
    for stage in ("train", "finetune", "train"):
        fit(small(), digits, settings(stage=stage, epochs=1), folder=tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["prune", "finetune", "train"]


class Poisoned(nn.Module):
    """Gives nan from its `healthy`-th training step on."""

    def __init__(self, healthy: int) -> None:
        super().__init__()
        self.inner, self.healthy, self.calls = small(), healthy, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += self.training
        logits: Tensor = self.inner(images)
        return logits * (math.nan if self.calls >= self.healthy else 1.0)


def test_nan_in_the_first_epoch_gives_the_old_weights_back(digits: Data) -> None:
    model = Poisoned(healthy=5)
    with pytest.raises(NamPrunerError, match=r"nan at step 5 \(epoch 1 of 2\).*before training"):
        fit(model, digits, settings())
    assert same_weights(model, Poisoned(healthy=5))


def test_nan_later_gives_the_last_good_epoch_back(digits: Data, tmp_path: Path) -> None:
    model = Poisoned(healthy=16)
    with pytest.raises(NamPrunerError, match=r"nan at step 16 \(epoch 2 of 2\).*after epoch 1"):
        fit(model, digits, settings(), folder=tmp_path / "nan")
    with pytest.raises(KeyboardInterrupt):
        fit(Poisoned(99), digits, settings(), folder=tmp_path, progress=Recorder(stop_at=12))
    good = torch.load(tmp_path / "train.unfinished.pt", weights_only=True)["model"]
    assert all(torch.equal(value, good[name]) for name, value in model.state_dict().items())


def test_infinite_validation_loss_stops(digits: Data) -> None:
    model = small()
    before = copy.deepcopy(model)
    spoiled = copy.copy(digits)
    object.__setattr__(spoiled, "validation", fixed_data(poison=0).validation)
    with pytest.raises(NamPrunerError, match="validation loss is nan"):
        fit(model, spoiled, settings())
    assert same_weights(model, before)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_nothing_is_left_on_the_model(digits: Data, precision: str) -> None:
    model = small()
    model[1].eval()
    attributes, modes = set(vars(model)), [m.training for m in model.modules()]
    parameters = list(model.parameters())
    fit(model, digits, settings(epochs=1, precision=precision), penalty=SparsityPenalty(model))
    assert set(vars(model)) == attributes
    assert [m.training for m in model.modules()] == modes
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in parameters)
    hooks = [m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()]
    assert not any(hooks)
    assert evaluate(copy.deepcopy(model), digits.test) == evaluate(model, digits.test)


def test_the_callers_accelerator_is_left_alone(digits: Data) -> None:
    states = [PartialState, AcceleratorState, GradientState]
    theirs = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        fit(small(), digits, settings(epochs=1))
        assert theirs.mixed_precision == "bf16"
        assert AcceleratorState().mixed_precision == "bf16"
    finally:
        for state in states:
            state._shared_state.clear()


def test_no_epochs_train_nothing(digits: Data) -> None:
    model = small()
    assert fit(model, digits, settings(epochs=0)).epochs == ()
    assert same_weights(model, small())


def test_evaluate_counts(digits: Data) -> None:
    model = small().train()
    found = evaluate(model, digits.test)
    assert model.training
    images = torch.cat([images for images, _ in digits.test])
    labels = torch.cat([labels for _, labels in digits.test])
    probabilities = model.eval()(images).detach().double().softmax(1).numpy()
    picked = probabilities[np.arange(len(labels)), labels.numpy()]
    assert found.images == len(labels)
    assert found.accuracy == (probabilities.argmax(1) == labels.numpy()).mean()
    assert found.loss == pytest.approx(-np.log(picked).mean(), rel=1e-5)


def test_mismatches_are_one_clear_error(digits: Data) -> None:
    with pytest.raises(NamPrunerError, match="7 classes apart, the data has 10"):
        fit(small(classes=7), digits, settings())
    with pytest.raises(NamPrunerError, match="7 classes apart"):
        evaluate(small(classes=7), digits.test)
    coloured = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(10))
    with pytest.raises(NamPrunerError, match=r"images \[1, 8, 8\] of 'digits'"):
        check_match(coloured[:1], digits)
    with pytest.raises(NamPrunerError, match=r"not logits \[N, classes\]"):
        check_match(nn.Conv2d(1, 4, 3), digits)


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(NamPrunerError, match="give auto, cpu, cuda or cuda:N"):
        resolve_device("gpu")
    with pytest.raises(NamPrunerError, match="PyTorch sees"):
        resolve_device("cuda:99")


def test_fp16_needs_a_gpu(digits: Data) -> None:
    with pytest.raises(NamPrunerError, match="bf16 on the CPU"):
        fit(small(), digits, settings(precision="fp16"))


WORKER = """
import sys, torch
from torch import nn
sys.path.insert(0, sys.argv[1])
from test_training import Watching, fixed_data, settings
from nampruner.training import fit
from pathlib import Path
torch.set_num_threads(1)
model = Watching()
rank = int(__import__("os").environ["RANK"])
fit(model, fixed_data(batch=5), settings(), folder=Path(sys.argv[2]))
torch.save(model.state_dict(), Path(sys.argv[2]) / f"{rank}.pt")
"""


class Watching(nn.Module):
    """Computes without BN, whose gradient would depend on the batch, but keeps BN statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        self.watch = nn.BatchNorm2d(1, affine=False)

    def forward(self, images: Tensor) -> Tensor:
        self.watch(images)
        logits: Tensor = self.inner(images)
        return logits


def test_two_processes_are_one_of_twice_the_batch(tmp_path: Path) -> None:
    everywhere = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    port = {"MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parent), str(tmp_path)]
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    environments = [os.environ | everywhere | port | rank for rank in ranks]
    workers = [subprocess.Popen(command, env=environment) for environment in environments]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    alone = Watching()
    rows = fit(alone, fixed_data(batch=10), settings()).epochs
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    for name, value in alone.inner.state_dict(prefix="inner.").items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in written] == [1, 2]
    assert written[1]["loss"] == pytest.approx(rows[1].loss, rel=1e-4)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
