"""BN statistics: the original's, moved as far as what reaches each BN has moved.

Both networks see the same images, so a handful is enough, and where nothing moved the statistics
stay what they were. Each batch is walked in forward order: a BN first gets the statistics of this
batch, and what comes after it sees them. What stays in the end is the mean over all batches.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nampruner.plan import PruningPlan
from nampruner.recovery.rows import others
from nampruner.recovery.survey import Hooks

_BN = nn.modules.batchnorm._BatchNorm
_AT_A_TIME = 2**19
"""Elements that are summed at a time; they should fit into a processor's cache."""


@dataclass(frozen=True)
class Moments:
    """Sums over n values of each channel, less a fixed shift [C], in float64."""

    count: int
    total: Tensor
    square: Tensor

    @staticmethod
    def of(x: Tensor, shift: Tensor) -> "Moments":
        """Sum over a batch [N, C, …]."""
        total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        square = total.clone()
        for part in x.split(max(1, _AT_A_TIME // max(x[0].numel(), 1))):
            away = part.reshape(*part.shape[:2], -1) - shift.to(x)[:, None]
            total += away.sum(2).double().sum(0)
            square += torch.linalg.vector_norm(away, dim=2).double().square().sum(0)
        return Moments(x.numel() // x.shape[1], total, square)

    def __add__(self, more: "Moments") -> "Moments":
        return Moments(self.count + more.count, self.total + more.total, self.square + more.square)

    def __getitem__(self, index: list[int]) -> "Moments":
        return Moments(self.count, self.total[index], self.square[index])

    @property
    def mean(self) -> Tensor:
        """Mean, less the shift [C]."""
        return self.total / self.count

    @property
    def var(self) -> Tensor:
        """Variance [C]."""
        return (self.square / self.count - self.mean.square()).clamp_min(0)


class _Norm:
    """One BN in both networks."""

    def __init__(self, dense: nn.Module, slim: nn.Module, stay: list[int]) -> None:
        self.slim, self.stay = slim, stay
        self.running: Tensor = dense.running_mean.clone()  # type: ignore[operator]
        self.mean = self.running[stay].double()
        self.var: Tensor = dense.running_var[stay].double()  # type: ignore[index]
        self.calls = 0
        self.moves = False
        self.wanted: Moments | None = None
        self.sums: tuple[Moments, Moments] | None = None

    def watch(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """In the original: what reaches it."""
        self.calls += 1
        self.wanted = Moments.of(inputs[0], self.running)[self.stay]

    def follow(self, x: Tensor) -> None:
        """In the slim network, reached by `x`: take on the statistics of this batch."""
        if self.wanted is None:
            return
        self.moves = True
        pair = self.wanted, Moments.of(x, self.running[self.stay])
        self.sums = pair if self.sums is None else (self.sums[0] + pair[0], self.sums[1] + pair[1])
        self.set(*pair)

    def set(self, was: Moments, now: Moments) -> None:
        """Move the original's statistics by the difference of the two."""
        eps: float = self.slim.eps  # type: ignore[assignment]
        var = (self.var + eps) * (now.var + eps) / (was.var + eps) - eps
        self.slim.running_mean.copy_(self.mean + now.mean - was.mean)  # type: ignore[operator]
        self.slim.running_var.copy_(var.clamp_min(0))  # type: ignore[operator]


class Norms:
    """All BN layers that keep statistics of their own, in both networks; there may be none."""

    def __init__(self, model: nn.Module, slim: nn.Module, plan: PruningPlan) -> None:
        self._norms: dict[str, _Norm] = {}
        found = {name: module for name, module in slim.named_modules() if isinstance(module, _BN)}
        holders = Counter(id(module.running_mean) for module in found.values())
        for name, module in found.items():
            dense = model.get_submodule(name)
            # statistics of two layers cannot be moved for one of them
            alone = holders[id(module.running_mean)] == 1
            if isinstance(dense.running_mean, Tensor) and alone:
                gone = plan.removed.get(f"{name}.running_mean", {}).get(0, [])
                stay = others(dense.running_mean.shape[0], gone)
                self._norms[name] = _Norm(dense, module, stay)

    def watch(self) -> Hooks:
        """Hooks before the original's modules, for one batch."""
        for norm in self._norms.values():
            norm.calls = 0
        return [(name, norm.watch) for name, norm in self._norms.items()]

    def follow(self, changed: Callable[[], bool] = lambda: False) -> Hooks:
        """Hooks before the slim network's modules, for the same batch.

        `changed` tells, in the first batch, whether anything before this point of the network has;
        later batches move what the first one moved.
        """

        def before(norm: _Norm) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                # one BN for two places would need two statistics: it keeps what it has
                if norm.calls == 1 and (norm.moves or changed()):
                    norm.follow(inputs[0])

            return hook

        return [(name, before(norm)) for name, norm in self._norms.items()]

    @property
    def moving(self) -> bool:
        """Whether there is anything for another batch to move."""
        return any(norm.moves for norm in self._norms.values())

    def settle(self) -> None:
        """Leave the statistics of all batches together."""
        for norm in self._norms.values():
            if norm.sums is not None:
                norm.set(*norm.sums)
