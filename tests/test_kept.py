"""What no plan names stays as it was: through the cut, recovery, saving and loading."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from zoo import ZOO, Depthwise, Net, image, lively, unit

from nampruner.checkpoint import load, read, save
from nampruner.errors import CheckpointError
from nampruner.graph import trace
from nampruner.nam import attach_nam
from nampruner.pruning import prune
from nampruner.settle import Cut
from nampruner.surgery import memory_layout, named_tensors

Change = Callable[[nn.Module], Any]


class Everything(Net):
    """Depthwise and plain layers, a shared weight, buffers of both kinds."""

    steps: Tensor
    kernel: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.deep = unit(16, 24, 1), unit(24, 24, groups=24)
        self.first, self.second = nn.Conv2d(24, 16, 1), nn.Conv2d(24, 16, 1)
        self.second.weight = self.first.weight
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("scale", torch.rand(1, 16, 1, 1) + 0.5)
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = (row[:, None] * row).expand(16, 1, 3, 3).clone()
        self.register_buffer("kernel", kernel, persistent=False)

    def middle(self, x: Tensor) -> Tensor:
        inner = self.deep(self.expand(x))
        x = x * self.scale.to(x.dtype) + self.first(inner) + self.second(inner.relu())
        return nn.functional.conv2d(x, self.kernel, padding=1, groups=x.shape[1])


def make(change: Change | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = lively(Everything()).eval()
    if change is not None:
        change(model)
    return model


def pruned(model: nn.Module, x: Any = None, *, recover: bool = True) -> Cut:
    x = image() if x is None else x
    data = [torch.cat([x] * 8) + torch.randn(16, 3, 8, 8).to(x)] if recover else None
    return prune(model, x, ratio=0.3, round_to=1, importance="random", data=data)


def kept(model: nn.Module) -> dict[str, Any]:
    """Everything but values and shapes."""
    return {
        name: (type(t), t.dtype, t.device, t.requires_grad, memory_layout(t))
        for name, t in named_tensors(model)
    } | {f"{name} runs in": module.training for name, module in model.named_modules()}


def freeze(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("stem", "deep.1", "first")))


def half_but_norms(model: nn.Module) -> None:
    """What mixed-precision inference does: everything in bfloat16 but BN."""
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()


CHANGES: dict[str, Change | None] = {
    "nothing": None,
    "frozen": freeze,
    "all frozen": lambda m: m.requires_grad_(False),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "one layer channels last": lambda m: m.stem.to(memory_format=torch.channels_last),
    "double": lambda m: m.double(),
    "a buffer in double": lambda m: m._buffers.update(scale=m.scale.double()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_through_cut_recovery_saving_and_loading(change: Change | None, tmp_path: Path) -> None:
    model = make(change)
    before, x = kept(model), image().to(next(model.parameters()).dtype)
    slim = pruned(model, x).model
    assert kept(model) == before
    assert kept(slim) == before
    again = load(save(slim, tmp_path / "slim"), model=make())
    assert kept(again) == before
    assert again.first.weight is again.second.weight
    assert torch.equal(again(x), slim(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make(lambda m: m.to(dtype))
    x = image().to(dtype)
    result = pruned(model, x)
    assert kept(result.model) == kept(model)
    assert result.certificate.output_error_recovered is not None
    again = load(save(result.model, tmp_path / "slim"), model=make())
    assert kept(again) == kept(model)
    assert torch.equal(again(x), result.model(x))


class Mixed(Net):
    """The stem in bfloat16 with BN in float32, as PyTorch allows it, the head in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight = next(self.stem.parameters())
        return self.head(self.stem(x.to(weight.dtype)).mean((2, 3)).to(self.head.weight.dtype))


def test_mixed_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lively(Mixed()).eval()
    half_but_norms(model.stem)
    result = pruned(model)
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}
    assert {name: t.dtype for name, t in result.model.state_dict().items()} == dtypes
    again = load(save(result.model, tmp_path / "slim"), model=Mixed())
    assert {name: t.dtype for name, t in again.state_dict().items()} == dtypes
    assert torch.equal(again(image()), result.model(image()))


def test_no_gradient_is_needed_and_none_is_left() -> None:
    model = make(lambda m: m.requires_grad_(False))
    assert pruned(model).plan == pruned(make()).plan
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_frozen_layers_get_no_gradient_after_reloading(tmp_path: Path) -> None:
    slim = pruned(make(freeze)).model
    again = load(save(slim, tmp_path / "slim"), model=make()).train()
    again(image()).sum().backward()
    for name, parameter in again.named_parameters():
        assert (parameter.grad is None) == name.startswith(("stem", "deep.1", "first"))


def test_a_frozen_source_may_be_thawed(tmp_path: Path) -> None:
    """What counts is the network that was saved, not the one that its source builds."""
    folder = save(pruned(make()).model, tmp_path / "slim")
    assert all(p.requires_grad for p in load(folder, model=make(freeze)).parameters())


# -- modes, hooks, buffers -------------------------------------------------------------------------


@pytest.mark.parametrize("recover", [False, True])
def test_modes_stay_module_by_module(recover: bool) -> None:
    model = make().train()
    model.deep[1].eval()
    slim = pruned(model, recover=recover).model
    modes = {name: module.training for name, module in model.named_modules()}
    assert {name: module.training for name, module in slim.named_modules()} == modes
    assert modes["deep.0"]
    assert not modes["deep.1"]


def hooks(model: nn.Module) -> dict[str, list[int]]:
    stores = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {name: [len(getattr(m, s)) for s in stores] for name, m in model.named_modules()}


def test_hooks_stay_and_none_is_added() -> None:
    model = make()
    ran: list[str] = []
    model.deep[0].register_forward_pre_hook(lambda *_: ran.append("before"))
    model.deep[0].register_forward_hook(lambda *_: ran.append("after"))
    model.deep[0].register_full_backward_hook(lambda *_: ran.append("back"))
    before = hooks(model)
    slim = pruned(model).model
    assert hooks(model) == before
    assert hooks(slim) == before
    ran.clear()
    slim(image()).sum().backward()
    assert ran == ["before", "after", "back"]


def test_a_hook_that_changes_the_output_is_part_of_the_network() -> None:
    model = make()
    model.expand.register_forward_hook(lambda module, args, out: out * 3 + 1)
    result = pruned(model, recover=False)
    assert result.plan.achieved.ratio > 0.2
    assert not torch.allclose(result.model(image()), pruned(make(), recover=False).model(image()))


def test_tracing_adds_no_hook_and_keeps_every_value() -> None:
    model = make().train()
    before, values = hooks(model), copy.deepcopy(model.state_dict())
    trace(model, image())
    assert hooks(model) == before
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


def test_buffers_of_both_kinds(tmp_path: Path) -> None:
    slim = pruned(make()).model
    width = slim.stem[0].out_channels
    assert width < 16
    assert slim.kernel.shape[0] == slim.scale.shape[1] == width
    assert slim._non_persistent_buffers_set == {"kernel"}
    assert slim.steps == 7
    slim.steps.add_(1)
    folder = save(slim, tmp_path / "slim")
    stored = load_file(folder / "model.safetensors")
    assert {"steps", "scale"} < set(stored)
    assert "kernel" not in stored
    again = load(folder, model=make())
    assert again.steps == 8
    assert torch.equal(again.kernel, slim.kernel)
    assert again._non_persistent_buffers_set == {"kernel"}


# -- sharing ---------------------------------------------------------------------------------------


def test_weights_that_the_user_tied_are_tied_again(tmp_path: Path) -> None:
    """The fresh network knows nothing of it."""
    torch.manual_seed(0)
    model = lively(Two()).eval()
    model.second.weight = model.first.weight
    slim = pruned(model).model
    assert slim.first.weight is slim.second.weight
    folder = save(slim, tmp_path / "slim")
    record = read(folder)
    assert record.kept is not None
    assert record.kept.tied == {"second.weight": "first.weight"}
    again = load(folder, model=Two())
    assert again.first.weight is again.second.weight
    assert torch.equal(again(image()), slim(image()))


class Two(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = unit(16, 12, 1)
        self.first, self.second = nn.Conv2d(12, 16, 1), nn.Conv2d(12, 16, 1)

    def middle(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.first(x) + self.second(x.relu())


def test_a_shared_module_is_cut_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ZOO["called_twice"].make()
    model.again = model.block
    slim = pruned(model).model
    assert slim.again is slim.block
    fresh = ZOO["called_twice"].make()
    fresh.again = fresh.block
    again = load(save(slim, tmp_path / "slim"), model=fresh)
    assert again.again is again.block
    assert torch.equal(again(image()), slim(image()))


def test_a_shared_buffer(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = ZOO["blur"].build()
        model.register_buffer("same", model.kernel)
        return lively(model).eval()

    slim = pruned(build(), recover=False).model
    assert slim.same is slim.kernel
    again = load(save(slim, tmp_path / "slim"), model=build())
    assert again.same is again.kernel


def test_nam_keeps_its_own_precision(tmp_path: Path) -> None:
    """Its denominator is float64 in a network of any dtype."""
    model = Depthwise()
    attach_nam(model, image())
    model = lively(model).bfloat16().eval()
    slim = pruned(model, image().bfloat16(), recover=False).model
    again = load(save(slim, tmp_path / "slim"), model=Depthwise())
    assert again.project.nam.channel.removed.dtype == torch.float64
    assert kept(again) == kept(slim)
    assert torch.equal(again(image().bfloat16()), slim(image().bfloat16()))


def test_a_dtype_that_no_checkpoint_holds(tmp_path: Path) -> None:
    model = make(lambda m: m.register_buffer("small", torch.zeros(3, dtype=torch.float8_e4m3fn)))
    with pytest.raises(CheckpointError, match=r"small is torch\.float8_e4m3fn; bring it to"):
        save(model, tmp_path / "x")
