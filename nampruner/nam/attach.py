"""How NAM gets into an existing network.

NAM becomes the child `nam` of its host module, and a forward hook of the host applies it. So no
module of the network is replaced: types, names and weights stay what they were, and deepcopy,
state_dict, torch.export and ONNX export see NAM as part of the host.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nampruner.errors import NamPrunerError, did_you_mean
from nampruner.lineage import NamSite, lineage, remember
from nampruner.modes import evaluating
from nampruner.nam.branches import (
    ForwardRecord,
    Inputs,
    call,
    record_forward,
    runs_children,
)
from nampruner.nam.module import NAM, ChannelNAM, Parts, SpatialNAM, nam_modules

_CHILD = "nam"


def attach_nam(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    parts: Parts = "both",
    at: Sequence[str] = (),
    detach_weight: bool = False,
    preserve: bool = True,
) -> tuple[NamSite, ...]:
    """Attach NAM, in place, at the end of every residual branch, before the sum.

    With `at`, globs on module names, NAM follows those modules instead. The model runs in eval
    mode to find the places and their sizes; `example_inputs` are a tensor, a tuple of arguments or
    a dict of keyword arguments. The sites are returned and recorded in the model's lineage.

    Every NAM gate starts at about ½. With `preserve` NAM's `gain` makes up for it (2 per part), so
    that a trained network starts near what it computed and a new one trains as without NAM;
    `preserve=False` is the paper's form, in which a branch starts at ½ (¼ with both parts).
    NAM's running statistics start from what it meets on `example_inputs`.

    Build the optimizer afterwards. `SyncBatchNorm.convert_sync_batchnorm` drops forward hooks:
    convert before attaching.

    Raises:
        NamPrunerError: no residual sum is found and `at` is empty; a glob matches nothing; a
            module does not run exactly once, is an nn.Sequential or returns no [N, C, H, W]; it
            has a NAM already.
    """
    seen = record_forward(model, example_inputs, opaque=(NAM,))
    names = _matching(model, seen, at) if at else seen.branches
    if not names:
        raise NamPrunerError(_no_branch(model))
    gain = (4.0 if parts == "both" else 2.0) if preserve else 1.0
    sites = tuple(
        NamSite(
            module=name,
            parts=parts,
            **_sizes(seen, _single(model, name)),
            detach_weight=detach_weight,
            gain=gain,
        )
        for name in names
    )
    attach_sites(model, sites)
    _start_statistics(model, example_inputs, sites)
    return sites


def attach_sites(model: nn.Module, sites: Iterable[NamSite]) -> None:
    """Attach NAM, in place, where `sites` say: what loading a checkpoint does.

    Raises:
        NamPrunerError: a module does not exist or already has a child `nam`; then nothing is done.
    """
    sites = tuple(sites)
    hosts = [_host(model, site.module) for site in sites]
    for host, site in zip(hosts, sites, strict=True):
        nam = NAM(
            site.channels,
            site.height,
            site.width,
            parts=site.parts,
            detach_weight=site.detach_weight,
            gain=site.gain,
        )
        like = next(host.parameters(), next(model.parameters(), torch.empty(0)))
        host.add_module(_CHILD, nam.to(like.device, like.dtype).train(host.training))
        host.register_forward_hook(apply_nam)
    known = {site.module: site for site in (*lineage(model).nam, *sites)}
    remember(model, nam=tuple(known.values()))


def resample_nam(model: nn.Module, example_inputs: Inputs) -> None:
    """Fit every spatial NAM of `model`, in place, to the size that `example_inputs` lead to.

    Warns:
        UserWarning: for every λ that is resampled (see `SpatialNAM.resample`).
    """

    def fit(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        height, width = inputs[0].shape[-2:]
        if isinstance(module, SpatialNAM) and (height, width) != (module.height, module.width):
            module.resample(height, width)

    parts = [module for module in model.modules() if isinstance(module, SpatialNAM)]
    handles = [part.register_forward_pre_hook(fit) for part in parts]
    _run_hooked(model, example_inputs, handles)
    remember(model, nam=tuple(_resized(model, site) for site in lineage(model).nam))


def _start_statistics(model: nn.Module, inputs: Inputs, sites: Iterable[NamSite]) -> None:
    # One mean and variance per layer, not per channel or pixel: sound even for a single image,
    # and enough to keep the gates off saturation until training has better ones.
    def start(norm: nn.BatchNorm2d | SpatialNAM, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(args[0].float(), correction=0)
        if norm.running_mean is not None and norm.running_var is not None and 0 < var < torch.inf:
            norm.running_mean.fill_(mean)
            norm.running_var.fill_(var)

    handles = []
    for site in sites:
        for part in nam_modules(model.get_submodule(f"{site.module}.{_CHILD}")).values():
            norm = part.bn if isinstance(part, ChannelNAM) else part
            handles.append(part.register_forward_pre_hook(partial(start, norm)))
    _run_hooked(model, inputs, handles)


def _run_hooked(model: nn.Module, inputs: Inputs, handles: Iterable[RemovableHandle]) -> None:
    try:
        with evaluating(model), torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()


def apply_nam(host: nn.Module, inputs: Any, output: Tensor) -> Any:
    """Forward hook of a host: hand its output through its NAM."""
    return host.get_submodule(_CHILD)(output)


def _resized(model: nn.Module, site: NamSite) -> NamSite:
    spatial = model.get_submodule(f"{site.module}.{_CHILD}.spatial")
    if not isinstance(spatial, SpatialNAM):
        return site
    return site.model_copy(update={"height": spatial.height, "width": spatial.width})


def _host(model: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name not in modules:
        raise NamPrunerError(
            f"the model has no module {name!r} to attach NAM to.{did_you_mean(name, modules)}"
        )
    if hasattr(modules[name], _CHILD):
        raise NamPrunerError(
            f"module {name!r} already has a child 'nam'; attach NAM once, or elsewhere with `at`"
        )
    return modules[name]


def _single(model: nn.Module, name: str) -> str:
    """Return `name`, of a module that would not run NAM a second time as one of its children."""
    host = model.get_submodule(name)
    if runs_children(host):
        layers = [f"{name}.{child}" for child, _ in host.named_children()]
        instead = f"its last layer, {layers[-1]!r}," if layers else "another one"
        raise NamPrunerError(
            f"module {name!r} runs its children in turn, and NAM would be one of them: give "
            f"{instead} in `at` (--nam-at)"
        )
    return name


def _matching(model: nn.Module, seen: ForwardRecord, globs: Sequence[str]) -> list[str]:
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, NAM))
    known = [name for name, _ in model.named_modules() if not f"{name}.".startswith(inside)]
    found: dict[str, None] = {}
    for glob in globs:
        hits = [name for name in known if name and fnmatchcase(name, glob)]
        if not hits:
            raise NamPrunerError(
                f"nam at {glob!r} matches no module.{did_you_mean(glob, known)} "
                f"{_normalizations(model)}"
            )
        found.update(dict.fromkeys(hits))
    return list(found)


def _sizes(seen: ForwardRecord, name: str) -> dict[str, int]:
    calls, shape = seen.calls[name], seen.shapes.get(name)
    if calls != 1:
        raise NamPrunerError(
            f"module {name!r} ran {calls} times in one forward pass; NAM needs a module that runs "
            "exactly once: give another one in `at` (--nam-at)"
        )
    if shape is None or len(shape) != 4:
        returned = "no tensor" if shape is None else f"a tensor of shape {list(shape)}"
        raise NamPrunerError(
            f"module {name!r} returns {returned}; NAM needs [N, C, H, W]: narrow the glob in `at` "
            "(--nam-at)"
        )
    return dict(zip(("channels", "height", "width"), shape[1:], strict=True))


def _no_branch(model: nn.Module) -> str:
    return (
        "no residual sum with a convolutional branch was found, so there is no default place for "
        f"NAM; say where with `at` (--nam-at), a glob on module names. {_normalizations(model)}"
    )


def _normalizations(model: nn.Module) -> str:
    batch_norm = nn.modules.batchnorm._BatchNorm
    names = [name for name, module in model.named_modules() if isinstance(module, batch_norm)]
    if not names:
        return "This model has no batch normalization; any convolution's name will do."
    return f"Batch normalizations here: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}."
