"""The penalty: what it pulls on, how far, and when it must not act."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from nampruner.errors import NamPrunerError, NoEffectWarning
from nampruner.nam import NAM
from nampruner.penalty import SparsityPenalty, fitting_strength, parameter_groups


class Net(nn.Module):
    """conv - BN - NAM - conv - BN without factors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.nam = NAM(4, 3, 5)
        self.last = nn.Conv2d(4, 2, 1)
        self.plain = nn.BatchNorm2d(2, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.last(self.nam(self.bn(self.conv(x)))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    for name, value in model.named_parameters():
        if name.endswith("weight") and value.ndim == 1:
            nn.init.uniform_(value, -1, 1)
    return model


def factors(net: Net) -> dict[str, nn.Parameter]:
    return {
        "bn": net.bn.weight,
        "gamma": net.nam.channel.bn.weight,
        "lambda": net.nam.spatial.weight,
    }


def snapshot(net: Net) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.named_parameters()}


def soft(value: Tensor, threshold: float) -> Tensor:
    array = value.detach().numpy()
    return torch.from_numpy(np.sign(array) * np.maximum(np.abs(array) - threshold, 0)).to(value)


# --- what it acts on ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switches", "names"),
    [
        ({}, {"bn", "gamma", "lambda"}),
        ({"bn": False}, {"gamma", "lambda"}),
        ({"nam": False}, {"bn"}),
    ],
)
def test_each_kind_has_its_switch(net: Net, switches: dict[str, bool], names: set[str]) -> None:
    penalty = SparsityPenalty(net, 0.1, **switches)
    chosen = [value for name, value in factors(net).items() if name in names]
    assert set(penalty.factors()) == set(chosen)
    expected = 0.1 * sum(np.abs(value.detach().numpy()).sum() for value in chosen)
    loss = penalty.loss()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    for value in chosen:
        torch.testing.assert_close(value.grad, 0.1 * value.detach().sign())


def test_frozen_factors_are_left_alone(net: Net) -> None:
    penalty = SparsityPenalty(net, 1.0)
    net.bn.weight.requires_grad_(False)
    before = snapshot(net)
    penalty.step(0.01)
    assert torch.equal(net.bn.weight, before["bn.weight"])
    assert not torch.equal(net.nam.spatial.weight, before["nam.spatial.weight"])


def test_nothing_to_penalize_warns(net: Net) -> None:
    with pytest.warns(NoEffectWarning, match="no scale factor to act on"):
        penalty = SparsityPenalty(nn.Linear(2, 2))
    assert penalty.loss() == 0
    assert penalty.zeros() == (0, 0)
    with pytest.warns(NoEffectWarning, match="the optimizer holds none"):
        SparsityPenalty(net).attach(SGD(net.conv.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "strength = -1.0; give"),
        ({"strength": float("nan")}, "strength = nan; give"),
        ({"method": "proximate"}, "Did you mean proximal"),
        ({"warmup_steps": -1}, "warmup_steps = -1; give"),
        ({"momentum": 1.0}, r"momentum = 1.0; give .* \[0, 1\)"),
    ],
)
def test_options_out_of_range(net: Net, options: dict[str, object], message: str) -> None:
    with pytest.raises(NamPrunerError, match=message):
        SparsityPenalty(net, **options)


# --- how far it pulls --------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["proximal", "subgradient"])
def test_step_moves_only_the_factors_and_by_the_threshold(net: Net, method: str) -> None:
    before, names = snapshot(net), {id(value) for value in factors(net).values()}
    SparsityPenalty(net, 0.1, method=method, momentum=0.75).step(0.5)
    threshold = 0.5 * 0.1 / 0.25
    for name, value in net.named_parameters():
        expected = before[name]
        if id(value) in names and method == "proximal":
            expected = soft(expected, threshold)
        elif id(value) in names:
            expected = expected - threshold * expected.sign()
        torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=1e-7)


def test_add_gradient_adds_the_sign(net: Net) -> None:
    net.bn.weight.grad = torch.full((4,), 2.0)
    SparsityPenalty(net, 0.1, method="subgradient").add_gradient()
    torch.testing.assert_close(net.bn.weight.grad, 2 + 0.1 * net.bn.weight.detach().sign())
    torch.testing.assert_close(
        net.nam.spatial.weight.grad, 0.1 * net.nam.spatial.weight.detach().sign()
    )
    assert net.conv.weight.grad is None
    assert net.bn.bias.grad is None


def test_strength_rises_over_the_warmup_and_resumes(net: Net) -> None:
    penalty = SparsityPenalty(net, 0.8, warmup_steps=4)
    seen = []
    for _ in range(6):
        seen.append(penalty.current_strength)
        penalty.step(1e-6)
    assert seen == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])
    resumed = SparsityPenalty(net, 0.8, warmup_steps=8)
    resumed.load_state_dict(penalty.state_dict())
    assert resumed.current_strength == pytest.approx(0.6)


def test_proximal_is_the_subgradient_in_the_long_run() -> None:
    """The threshold lr·p / (1 - momentum) is the way SGD goes under a constant p·sign(γ)."""
    ends = []
    for method in ("proximal", "subgradient"):
        model = nn.Sequential(nn.BatchNorm2d(3))
        optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
        SparsityPenalty(model, 0.01, method=method).attach(optimizer)
        for _ in range(500):
            model[0].weight.grad = torch.zeros(3)
            optimizer.step()
        ends.append(model[0].weight.detach())
    assert 0.45 < ends[0][0] < 0.55
    torch.testing.assert_close(ends[0], ends[1], rtol=0.03, atol=0)


def regression(method: str) -> tuple[Tensor, tuple[int, int]]:
    """Fit y = x₀ - x₁ through six BN factors, of which the last four are useless."""
    torch.manual_seed(0)
    x = torch.randn(256, 6, 1, 1)
    y = x[:, 0] - x[:, 1]
    model = nn.Sequential(nn.BatchNorm2d(6))
    sign = torch.tensor([1.0, -1, 1, -1, 1, -1]).view(1, 6, 1, 1)
    optimizer = SGD(parameter_groups(model, 1e-4), lr=0.02, momentum=0.9)
    penalty = SparsityPenalty(model, 0.05, method=method)
    penalty.attach(optimizer)
    for _ in range(300):
        optimizer.zero_grad()
        ((model(x) * sign).sum(1) - y).square().mean().backward()
        optimizer.step()
    return model[0].weight.detach(), penalty.zeros()


def test_only_the_proximal_step_reaches_zero() -> None:
    weight, zeros = regression("proximal")
    assert weight[2:].tolist() == [0, 0, 0, 0]
    assert weight[:2].min() > 0.8
    assert zeros == (4, 6)
    weight, zeros = regression("subgradient")
    assert weight[2:].abs().max() < 0.05
    assert zeros == (0, 6)


# --- when it acts: hooks -----------------------------------------------------------------------


def batch(net: Net) -> Tensor:
    return net(torch.randn(4, 1, 3, 5, generator=torch.Generator().manual_seed(1))).sin().sum()


def test_hooks_read_lr_and_momentum_of_each_group(net: Net) -> None:
    groups = [
        {"params": [net.bn.weight], "lr": 0.5, "momentum": 0.5},
        {"params": list(net.nam.parameters()), "lr": 0.2, "momentum": 0.0},
    ]
    optimizer = SGD(groups, lr=1.0)
    SparsityPenalty(net, 0.1).attach(optimizer)
    before = snapshot(net)
    optimizer.param_groups[1]["lr"] = 0.4  # as a scheduler does
    optimizer.step()
    for name, threshold in (("bn.weight", 0.1), ("nam.spatial.weight", 0.04)):
        value = net.get_parameter(name).detach()
        torch.testing.assert_close(value, soft(before[name], threshold))


def test_adam_has_no_momentum_factor_and_no_subgradient(net: Net) -> None:
    optimizer = AdamW(net.parameters(), lr=0.1, weight_decay=0)
    SparsityPenalty(net, 0.2).attach(optimizer)
    before = snapshot(net)
    optimizer.step()
    torch.testing.assert_close(net.bn.weight.detach(), soft(before["bn.weight"], 0.02))
    with pytest.warns(UserWarning, match="normalizes the subgradient away"):
        SparsityPenalty(net, method="subgradient").attach(optimizer)


@pytest.mark.parametrize("method", ["proximal", "subgradient"])
def test_accumulation_pulls_once_per_step(net: Net, method: str) -> None:
    def train(backwards: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Net()
        optimizer = SGD(model.parameters(), lr=0.1)
        penalty = SparsityPenalty(model, 0.5, method=method)
        penalty.attach(optimizer)
        for _ in range(backwards):
            (batch(model) / backwards).backward()
        optimizer.step()
        assert penalty.steps == 1
        return snapshot(model)

    once, twice = train(1), train(2)
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["proximal", "subgradient"])
def test_scaled_steps_pull_as_unscaled_ones_and_skipped_ones_do_not(
    method: str, fused: bool
) -> None:
    """A fused optimizer unscales and skips inside its kernel, after and before the hooks."""

    def train(scale: float | None) -> tuple[Net, SparsityPenalty, SGD, torch.amp.GradScaler]:
        torch.manual_seed(0)
        model = Net()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        penalty = SparsityPenalty(model, 0.5, method=method)
        penalty.attach(optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(batch(model)).backward()
            scaler.step(optimizer)
            scaler.update()
        return model, penalty, optimizer, scaler

    plain = train(None)[0]
    model, penalty, optimizer, scaler = train(1024.0)
    assert penalty.steps == 2
    for name, value in snapshot(plain).items():
        torch.testing.assert_close(model.get_parameter(name).detach(), value, rtol=1e-4, atol=1e-6)

    before = snapshot(model)
    scaler.scale(batch(model) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert penalty.steps == 2
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)


def test_handles_take_the_penalty_off(net: Net) -> None:
    optimizer = SGD(net.parameters(), lr=0.1)
    penalty = SparsityPenalty(net, 0.5, method="subgradient")
    for handle in penalty.attach(optimizer):
        handle.remove()
    before = snapshot(net)
    optimizer.step()
    assert penalty.steps == 0
    assert torch.equal(net.bn.weight, before["bn.weight"])


def train_on_rank(rank: int, folder: str) -> None:
    """Three steps on data that differ by rank; leave the factors in `folder`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Net())
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    penalty = SparsityPenalty(model, 0.5)
    penalty.attach(optimizer)
    torch.manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 3, 5)).sin().sum().backward()
        optimizer.step()
    torch.save([*penalty.factors()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_agree_under_distributed_training(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_on_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert [value.shape for value in first] == [(4,), (4,), (15,)]
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left, right)
    assert bool((first[2] == 0).any())  # the penalty did act on λ


# --- weight decay ------------------------------------------------------------------------------


def test_scale_factors_and_biases_do_not_decay(net: Net) -> None:
    net.last.weight.requires_grad_(False)
    decay, rest = parameter_groups(net, 5e-4)
    assert decay == {"params": [net.conv.weight], "weight_decay": 5e-4}
    assert rest["weight_decay"] == 0
    names = {
        name for name, value in net.named_parameters() if any(value is p for p in rest["params"])
    }
    assert names == {
        "conv.bias",
        "last.bias",
        *(
            f"{norm}.{kind}"
            for norm in ("bn", "nam.channel.bn", "nam.spatial")
            for kind in ("weight", "bias")
        ),
    }


def test_under_a_fitting_strength_a_free_factor_falls_by_as_much_as_asked() -> None:
    model = nn.BatchNorm2d(4)
    strength = fitting_strength(0.1, 50, momentum=0.9, fall=1.0)
    penalty = SparsityPenalty(model, strength * 1.0001)
    for _ in range(49):
        penalty.step(0.1)
    assert penalty.zeros() == (0, 4)
    penalty.step(0.1)
    assert penalty.zeros() == (4, 4)
