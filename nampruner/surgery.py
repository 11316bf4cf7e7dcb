"""Carry out a plan: the only room that changes a model, and the only one that knows torch_pruning.

It sees index lists and attributes, never a ratio or a score.
"""

import operator
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from nampruner.baking import bake_again
from nampruner.errors import NamPrunerError, did_you_mean
from nampruner.graph import DependencyGraph
from nampruner.graph.graph import Bools
from nampruner.lineage import Literals, lineage, remember
from nampruner.plan import PruningPlan, Repair
from nampruner.twins import twin

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch_pruning.pruner import function as knife

Cuts = Mapping[str, Mapping[int, list[int]]]
Owners = dict[str, list[tuple[nn.Module, str]]]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BN = nn.modules.batchnorm._BatchNorm
_SYNCED = (*_CONV, *_TRANSPOSED, nn.Linear, _BN)
_SHAPES = ("in_channels", "out_channels", "in_features", "out_features", "num_features")
"""Attributes of these layers that follow from tensor shapes; others are repaired as facts."""


def cut(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Return a new model with the plan's channels removed; `model` is untouched.

    What a model was frozen, shared, in training, on a device or in a dtype stays so.
    """
    # what is cut is replaced, so that a copy of it would be thrown away
    cut_up = {name for name, dims in plan.removed.items() if any(dims.values())}
    slim = twin(model, lambda name, tensor: tensor if name in cut_up else tensor.clone())
    bake_again(slim, plan.baked)
    apply_cuts(slim, plan.removed)
    modules = dict(slim.named_modules())
    for repair in plan.repairs:
        set_literal(modules[repair.module], repair.attribute, repair.after)
        sync_shape(modules[repair.module])
    history = lineage(model)
    attributes = {name: dict(values) for name, values in history.attributes.items()}
    for name, values in changed_attributes(model, slim).items():
        attributes.setdefault(name, {}).update(values)
    remember(slim, attributes=attributes, plans=(*history.plans, plan))
    return slim


def apply_cuts(model: nn.Module, removed: Cuts) -> None:
    """Remove these indices in place, module by module.

    Raises:
        NamPrunerError: they are not of this model; then it is as before.
    """
    check_cuts(model, removed)
    left = {name: {dim: list(i) for dim, i in dims.items()} for name, dims in removed.items()}
    for path, module in list(model.named_modules()):
        if hasattr(module, "keep_channels"):
            _tell(path, module, left)
    owners = owners_of(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    layouts = {name: memory_layout(tensor) for name, tensor in named_tensors(model)}
    by_module: dict[str, dict[str, dict[int, list[int]]]] = defaultdict(dict)
    for name, dims in left.items():
        path, _, key = name.rpartition(".")
        by_module[path][key] = dims
    modules = dict(model.named_modules())
    for path, cuts in by_module.items():
        prefix = f"{path}." if path else ""
        if all(len(owners[prefix + key]) == 1 for key in cuts):
            cuts = _known_layer(modules[path], cuts)
        for key, dims in cuts.items():
            _slice(owners[prefix + key], dims)
    for name, p in model.named_parameters():
        p.requires_grad_(flags[name])
    for name, tensor in named_tensors(model):
        if memory_layout(tensor) != layouts[name]:
            tensor.data = tensor.data.contiguous(memory_format=layouts[name])
    for module in modules.values():
        sync_shape(module)


def check_cuts(model: nn.Module, removed: Cuts) -> None:
    """See that every index exists, is listed once and in order, and that something stays.

    Raises:
        NamPrunerError: the plan is of another model, or damaged.
    """
    tensors = dict(named_tensors(model))
    for name, dims in removed.items():
        if name not in tensors:
            raise NamPrunerError(
                f"the plan cuts {name!r}, which is no tensor of {type(model).__name__}; carry it "
                f"out on the model that it was made for.{did_you_mean(name, tensors)}"
            )
        shape = tensors[name].shape
        for dim, gone in dims.items():
            size = shape[dim] if 0 <= dim < len(shape) else 0
            rising = all(map(operator.lt, gone, gone[1:]))
            if not rising or (gone and (gone[0] < 0 or gone[-1] >= size)) or len(gone) >= size:
                raise NamPrunerError(
                    f"the plan's indices for {name} {list(shape)} along dimension {dim} are not "
                    f"rising, do not exist, or leave nothing; make the plan again"
                )


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer once, saved or not."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def memory_layout(tensor: Tensor) -> torch.memory_format:
    """Return channels_last (2-D or 3-D) where the tensor is laid out so, else contiguous."""
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        last = tensor.dim() == rank and tensor.is_contiguous(memory_format=layout)
        if last and not tensor.is_contiguous():
            return layout
    return torch.contiguous_format


def _tell(path: str, module: nn.Module, left: dict[str, dict[int, list[int]]]) -> None:
    """A module that must know what it loses (NAM's denominator) cuts itself."""
    mine = [name for name in left if name.startswith(f"{path}.")]
    if mine:
        gone = set(left[mine[0]][0])
        tensor = dict(module.named_parameters())[mine[0].removeprefix(f"{path}.")]
        kept = [i for i in range(tensor.shape[0]) if i not in gone]
        module.keep_channels(torch.tensor(kept, device=tensor.device))  # type: ignore[operator]
        for name in mine:
            del left[name]


def _known_layer(
    module: nn.Module, cuts: dict[str, dict[int, list[int]]]
) -> dict[str, dict[int, list[int]]]:
    """Let torch_pruning cut the layer types it knows; return what is left to cut."""
    weight = cuts.get("weight", {}).copy()
    out: list[int] | None = None
    if isinstance(module, _CONV) and 1 < module.groups == module.in_channels == module.out_channels:
        out = weight.pop(0, None)
        if out:
            knife.prune_depthwise_conv_out_channels(module, out)
    elif isinstance(module, (*_CONV, *_TRANSPOSED)) and module.groups == 1:
        rows, columns = (1, 0) if isinstance(module, _TRANSPOSED) else (0, 1)
        out, into = weight.pop(rows, None), weight.pop(columns, None)
        if out:
            knife.prune_conv_out_channels(module, out)
        if into:
            knife.prune_conv_in_channels(module, into)
    elif isinstance(module, nn.Linear):
        out, into = weight.pop(0, None), weight.pop(1, None)
        if out:
            knife.prune_linear_out_channels(module, out)
        if into:
            knife.prune_linear_in_channels(module, into)
    elif isinstance(module, _BN) and module.affine and module.bias is not None:
        knife.prune_batchnorm_out_channels(module, weight.pop(0))
        return {}
    rest = {key: dims for key, dims in cuts.items() if key not in ("weight", "bias")}
    if weight:
        rest["weight"] = weight
    if "bias" in cuts and not out:
        rest["bias"] = cuts["bias"]
    return rest


def owners_of(model: nn.Module) -> Owners:
    """Every parameter and buffer name → all (module, key) that hold this very tensor."""
    holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    names: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                if tensor is not None:
                    holders[id(tensor)].append((module, key))
                    names[f"{path}.{key}" if path else key] = tensor
    return {name: holders[id(tensor)] for name, tensor in names.items()}


def _slice(holders: list[tuple[nn.Module, str]], dims: Mapping[int, list[int]]) -> None:
    module, key = holders[0]
    old: Tensor = getattr(module, key)
    new = old.detach()
    for dim, gone in dims.items():
        keep = torch.ones(new.shape[dim], dtype=torch.bool)
        keep[gone] = False
        new = new.index_select(dim, keep.nonzero().flatten().to(new.device))
    replace_tensor(holders, new)


def replace_tensor(holders: list[tuple[nn.Module, str]], new: Tensor) -> None:
    """Put `new` wherever the old tensor was; sharing and `requires_grad` survive."""
    module, key = holders[0]
    old: Tensor = getattr(module, key)
    value = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    for module, key in holders:
        store = module._parameters if key in module._parameters else module._buffers
        store[key] = value  # type: ignore[assignment]


def add_bias(module: nn.Module) -> None:
    """Give a convolution or linear layer a bias of zeros, in place."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    transposed = isinstance(module, _TRANSPOSED)
    size = weight.shape[1] * int(module.groups) if transposed else weight.shape[0]  # type: ignore[arg-type]
    module.bias = nn.Parameter(weight.new_zeros(size), weight.requires_grad)


def sync_shape(module: nn.Module) -> None:
    """Make the shape attributes of a standard layer say what its tensors are."""
    weight = getattr(module, "weight", None)
    if isinstance(module, (*_CONV, *_TRANSPOSED)) and weight is not None:
        first, second = weight.shape[0], weight.shape[1] * module.groups
        swap = isinstance(module, _TRANSPOSED)
        module.in_channels, module.out_channels = (first, second) if swap else (second, first)
    elif isinstance(module, nn.Linear) and weight is not None:
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _BN):
        tensor = weight if weight is not None else module.running_mean
        if tensor is not None:
            module.num_features = tensor.shape[0]


def find_repairs(
    model: nn.Module, graph: DependencyGraph, removed: Bools, ops: Iterable[str]
) -> tuple[Repair, ...]:
    """Attributes that hold a number which one of `ops` was called with and which must now change.

    Looked for in the module in which the op ran. An attribute that two ops want to be different
    numbers is left: the certificate will refuse the cut.
    """
    modules = dict(model.named_modules())
    found: dict[tuple[str, str], Repair | None] = {}
    wanted = set(ops)
    for width in graph.widths:
        after = width.after(removed)
        if width.op not in wanted or after == width.before:
            continue
        module = modules[width.module]
        for name, value in vars(module).items():
            follows = name in _SHAPES and isinstance(module, _SYNCED)
            if not follows and literal(value) == width.before:
                key = (width.module, name)
                repair = Repair(module=key[0], attribute=name, before=width.before, after=after)
                found[key] = repair if found.get(key, repair) == repair else None
    return tuple(repair for repair in found.values() if repair)


def literal(value: object) -> int | tuple[int, ...] | None:
    """The integer or the integers an attribute holds; None for everything else."""
    if type(value) is int:
        return value
    if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
        return tuple(value)
    return None


def set_literal(module: nn.Module, attribute: str, value: int | tuple[int, ...]) -> None:
    """Set an integer attribute; a list stays a list and a tuple a tuple."""
    is_list = isinstance(getattr(module, attribute), list)
    setattr(module, attribute, list(value) if is_list and isinstance(value, tuple) else value)


def changed_attributes(model: nn.Module, slim: nn.Module) -> dict[str, dict[str, Literals]]:
    """Module → attribute → new value, for every integer attribute in which the two differ."""
    changes: dict[str, dict[str, Literals]] = {}
    before = dict(model.named_modules())
    for path, new in slim.named_modules():
        for name, value in vars(new).items():
            now = literal(value)
            if now is not None and now != literal(vars(before[path]).get(name)):
                changes.setdefault(path, {})[name] = now
    return changes
