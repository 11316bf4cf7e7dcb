"""Which networks `reach.py` measures; nothing here is a list of names.

timm is asked for its models. Two of one module that are made of the same blocks are one family, and
of every family the smallest with BatchNorm is taken; torchvision's are all taken, a backbone that
several detectors share once.
"""

import inspect
import json
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

LARGEST = 200_000_000
"""Parameters; in float64 and four copies, more than that does not fit a small machine."""
PLAIN = re.compile(r"activations|drop|norm|linear|classifier|adaptive_avgmax|\.Identity$")
"""Classes of timm that do not tell one family from another."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Network:
    """`timm:NAME`, `torchvision:NAME` or `detection:NAME`; parameters as published."""

    name: str
    family: str
    params: int

    @property
    def source(self) -> str:
        """What `nampruner.build` takes."""
        library, _, name = self.name.partition(":")
        return self.name if library != "detection" else f"{__file__}:backbone?detector={name}"

    @property
    def file_stem(self) -> str:
        return self.name.replace(":", "_")


def backbone(detector: str) -> nn.Module:
    """The backbone of a torchvision detector, FPN included: [N, 3, H, W] → maps by name."""
    builder = torchvision.models.get_model_builder(detector)
    none = {key: None for key in inspect.signature(builder).parameters if "weights" in key}
    return builder(**none).backbone


@dataclass(frozen=True)
class Facts:
    """What a network is made of, read off without its weights."""

    params: int
    norms: int
    blocks: tuple[str, ...]
    """timm's classes in it, as module.class."""
    shapes: str
    """Of all tensors."""


def chosen(cache: Path, per: str, say: Say) -> list[Network]:
    """All networks to measure; `per` is `blocks` (a family is a set of blocks) or `module`.

    Looking at every model of timm takes minutes, so what was seen is kept in `cache`.
    """
    seen = _catalogue(cache, say)
    families: dict[tuple[str, ...], list[tuple[int, str, str]]] = {}
    for name, row in seen["timm"].items():
        if row["norms"] and row["params"] <= LARGEST:
            blocks = (b for b in row["blocks"] if not PLAIN.search(b))
            key = (row["module"], *(blocks if per == "blocks" else ()))
            families.setdefault(key, []).append((row["params"], name, row["module"]))
    best = sorted((min(members) for members in families.values()), key=lambda m: (m[2], m[1]))
    networks = [Network(f"timm:{name}", module, params) for params, name, module in best]
    for kind in ("classification", "segmentation", "detection"):
        networks += _of_torchvision(kind, seen[kind], say)
    return networks


def _of_torchvision(kind: str, rows: dict[str, Any], say: Say) -> Iterator[Network]:
    library = "detection" if kind == "detection" else "torchvision"
    known: set[str] = set()
    for name, row in rows.items():
        if not row["norms"] or (kind == "detection" and row["shapes"] in known):
            continue
        known.add(row["shapes"])
        if row["params"] > LARGEST:
            say(f"{library}:{name} is left out: {row['params'] / 1e6:.0f} M parameters")
            continue
        yield Network(f"{library}:{name}", f"torchvision {kind}", row["params"])


def _catalogue(cache: Path, say: Say) -> dict[str, Any]:
    """Facts of every model of timm and torchvision; made once per version of the two."""
    file = cache / f"catalogue-timm{timm.__version__}-torchvision{version('torchvision')}.json"
    if not file.exists():
        models = torchvision.models
        makers: dict[str, dict[str, Callable[[], nn.Module]]] = {
            "timm": {n: partial(timm.create_model, n) for n in _timm_names()},
            "classification": {n: _maker(n) for n in models.list_models(module=models)},
            "segmentation": {n: _maker(n) for n in models.list_models(module=models.segmentation)},
            "detection": {
                n: partial(backbone, n) for n in models.list_models(module=models.detection)
            },
        }
        rows = {kind: _surveyed(kind, of_kind, say) for kind, of_kind in makers.items()}
        for name, row in rows["timm"].items():
            row["module"] = timm.models._registry._model_to_module[name]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows))
    return json.loads(file.read_text())


def _timm_names() -> list[str]:
    """All but timm's own test fixtures."""
    return [name for name in timm.list_models() if not name.startswith("test_")]


def _maker(name: str) -> Callable[[], nn.Module]:
    builder = torchvision.models.get_model_builder(name)
    none = {key: None for key in inspect.signature(builder).parameters if "weights" in key}
    return partial(builder, **none)


def _surveyed(
    kind: str, makers: dict[str, Callable[[], nn.Module]], say: Say
) -> dict[str, dict[str, Any]]:
    rows, start = {}, time.perf_counter()
    for number, (name, make) in enumerate(makers.items(), start=1):
        facts = _facts(make)
        if facts is None:
            say(f"{kind} {name} cannot be built and is left out")
        else:
            rows[name] = dict(facts.__dict__)
        if number % 100 == 0 or number == len(makers):
            say(f"looked at {number}/{len(makers)} {kind}, {time.perf_counter() - start:.0f} s")
    return rows


def _facts(make: Callable[[], nn.Module]) -> Facts | None:
    """Build without memory where the network allows it, else for real."""
    for device in ("meta", "cpu"):
        try:
            with warnings.catch_warnings(), torch.device(device):
                warnings.simplefilter("ignore")
                model = make()
            break
        except Exception:  # whatever a library may raise, the network is not to be had
            continue
    else:
        return None
    modules = list(model.modules())
    classes = {f"{type(m).__module__}.{type(m).__qualname__}" for m in modules}
    return Facts(
        params=sum(p.numel() for p in model.parameters()),
        norms=sum(isinstance(m, _BatchNorm) for m in modules),
        blocks=tuple(sorted(c for c in classes if c.startswith("timm."))),
        shapes=str([tuple(t.shape) for t in model.state_dict().values()]),
    )
