"""Masked against pruned: the proof that a cut is exact, and the search for what is at fault.

*Masked* is the original with the removed input slices of every consumer set to zero; *pruned* is
the same with everything removed for real. In float64 they must agree to 1e-9.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._pytree import tree_flatten, tree_map

from nampruner.baking import bake_again
from nampruner.errors import CertificateError, GraphError
from nampruner.graph import Forward, call_model
from nampruner.lineage import lineage
from nampruner.modes import evaluating
from nampruner.plan import Certificate, PruningPlan
from nampruner.surgery import cut
from nampruner.twins import twin

TOLERANCE = 1e-9
_ADDING = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase)
"""Layers whose bias is added to their outputs, and nothing else."""
T = TypeVar("T")


def certify(
    model: nn.Module,
    slim: nn.Module,
    plan: PruningPlan,
    example_inputs: Any,
    forward: Forward | None = None,
) -> Certificate:
    """Compare the masked original with `slim`, straight after the cut, in float64.

    Zeros hide a wrong cut behind them (a scale factor, a fresh residual gate, a blank image), so
    where they could, the same plan is tried once more on a copy, and inputs, without them.

    Raises:
        CertificateError: the pruned network does not run, or computes something else.
        GraphError: the original does not run in float64.
    """
    run = forward or call_model
    inputs = tree_map(_double, example_inputs)
    model = _baked(model, plan)
    error = _difference(_masked(_exact(model), plan), _exact(slim), inputs, run)
    hiding = _hiding(model, plan)
    stirred = tree_map(_lively, inputs)
    if hiding or any(a is not b for a, b in zip(_flat(inputs), _flat(stirred), strict=True)):
        dense = _exact(model)
        _stir(dense, hiding)
        pruned = cut(dense, plan)
        error = max(error, _difference(_masked(dense, plan), pruned, stirred, run))
    if not error <= TOLERANCE:
        raise CertificateError(
            f"the cut is not exact: pruned and masked differ by {error:.1e} (relative), "
            f"allowed is {TOLERANCE:.0e}"
        )
    first = next(t for t in _flat(inputs) if isinstance(t, Tensor))
    return Certificate(max_relative_error=error, inputs=first.shape[0] if first.dim() else 1)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _exact(model: nn.Module) -> nn.Module:
    """A copy in float64 and eval mode; tensors that are no parameters or buffers follow as well."""

    def exact(_: str, tensor: Tensor) -> Tensor:
        return tensor.to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)

    return twin(model, exact).double().eval()


def _baked(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """The model with every layer baked that the plan wants so; itself where that is done."""
    if set(plan.baked) <= set(lineage(model).baked):
        return model
    dense = copy.deepcopy(model)
    bake_again(dense, plan.baked)
    return dense


def _masked(dense: nn.Module, plan: PruningPlan) -> nn.Module:
    """The same network, with the removed slices of its consumers at zero, in place."""
    tensors = {**dict(dense.named_parameters()), **dict(dense.named_buffers())}
    with torch.no_grad():
        for name, dims in plan.masked.items():
            for dim, gone in dims.items():
                index = torch.tensor(gone, device=tensors[name].device)
                tensors[name].index_fill_(dim, index, 0)
    return dense


def _flat(values: Any) -> list[Any]:
    return list(tree_flatten(values)[0])


def _hiding(model: nn.Module, plan: PruningPlan) -> list[str]:
    """Parameters with exact zeros behind which a wrong cut could hide.

    Nothing hides behind a zero that a layer only adds, unless it is cut itself.
    """
    added = {
        f"{path}.bias" for path, module in model.named_modules() if isinstance(module, _ADDING)
    } - set(plan.removed)
    return [name for name, p in model.named_parameters() if name not in added and _hides(p)]


def _hides(parameter: Tensor) -> bool:
    """Whether a channel is all zeros, or more than a lone weight here and there."""
    zeros = parameter.numel() - int(parameter.count_nonzero())
    if parameter.dim() < 2 or zeros > 1e-3 * parameter.numel():
        return zeros > 0
    return zeros > 0 and any(
        bool((parameter.movedim(d, 0).flatten(1) == 0).all(1).any()) for d in range(parameter.dim())
    )


def _stir(model: nn.Module, names: Iterable[str]) -> None:
    """Replace exact zeros of these parameters by noise, in place."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in map(parameters.__getitem__, names):
            noise = torch.rand(parameter.shape, generator=generator).to(parameter)
            fan = max(1, parameter[0].numel() if parameter.dim() > 1 else 1)
            parameter.copy_(torch.where(parameter == 0, (noise + 0.5) / fan**0.5, parameter))


def _lively(value: Any) -> Any:
    """A constant input tells nothing: noise of the same shape instead."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
        return value
    if bool((value != value.flatten()[0]).any()):
        return value
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)


def _difference(masked: nn.Module, slim: nn.Module, inputs: Any, run: Forward) -> float:
    """Largest |masked - pruned| over the largest |masked|, worst output; NaN counts as infinite."""
    try:
        wanted = _outputs(masked, inputs, run)
    except Exception as error:
        raise GraphError(
            f"the network does not run in float64, in which a cut is certified: {error}; "
            "let tensors made in its forward take the dtype of the input"
        ) from error
    try:
        got = _outputs(slim, inputs, run)
    except Exception as error:  # any failure of the slim network is the cut's fault
        raise CertificateError(
            f"the pruned network does not run: {error}", module=_stopped_in(slim, inputs, run)
        ) from error
    if [t.shape for t in wanted] != [t.shape for t in got]:
        raise CertificateError("the pruned network returns other shapes than the original")
    worst = 0.0
    for a, b in zip(wanted, got, strict=True):
        ratio = ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item() if a.numel() else 0.0
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def _outputs(model: nn.Module, inputs: Any, run: Forward) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(run(model, copy.deepcopy(inputs)))


def _stopped_in(model: nn.Module, inputs: Any, run: Forward) -> str:
    """Path of the innermost module in which the network fails."""
    paths, stack = {id(m): path for path, m in model.named_modules()}, [""]

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(paths.get(id(module), stack[-1]))

    def leave(*_: Any) -> None:
        stack.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        with suppress(Exception):
            _outputs(model, inputs, run)
    finally:
        for handle in handles:
            handle.remove()
    return stack[-1]


def _tensors(outputs: Any) -> list[Tensor]:
    return [t for t in tree_flatten(outputs)[0] if isinstance(t, Tensor) and t.is_floating_point()]


def culprits(
    items: Sequence[T], holds: Callable[[Sequence[T]], bool], good: Iterable[T] = ()
) -> list[T]:
    """The items at fault, by halving: those that fail alone, or together with what already holds.

    `holds` tells whether cutting just these items is exact; cutting the `good` ones is.
    """
    fine = list(good)
    bad: list[T] = []

    def search(part: Sequence[T]) -> None:
        if holds([*fine, *part]):
            fine.extend(part)
        elif len(part) == 1:
            bad.extend(part)
        else:
            search(part[: len(part) // 2])
            search(part[len(part) // 2 :])

    search(items)
    return bad


def cost_of(
    model: nn.Module, slim: nn.Module, batches: Iterable[Tensor], forward: Forward | None = None
) -> tuple[float, float]:
    """What a cut costs on real inputs: ‖slim - dense‖ / ‖dense‖ of the outputs, top-1 agreement.

    `batches` are inputs [N, C, H, W]; outputs are logits [N, classes] (of several, the first).
    """
    run = forward or call_model
    missed = norm = same = total = 0.0
    device = next(model.parameters()).device
    with evaluating(model, slim), torch.no_grad():
        for batch in batches:
            a, b = (_tensors(run(net, batch.to(device)))[0].double() for net in (model, slim))
            missed += float((a - b).square().sum())
            norm += float(a.square().sum())
            same += float((a.flatten(1).argmax(1) == b.flatten(1).argmax(1)).sum())
            total += a.shape[0]
    return (missed / max(norm, 1e-30)) ** 0.5, same / max(total, 1)
