"""Scores against independent computations on networks of a few channels."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO, ResidualProjection, image

from nampruner.errors import NamPrunerError
from nampruner.graph import DependencyGraph, trace
from nampruner.importance import score

Scores = NDArray[np.float64]
LABELS = torch.tensor([0, 3])


def units_of(graph: DependencyGraph, name: str, dim: int = 0) -> NDArray[np.int64]:
    return graph.units(next(s for s in graph.slots if s.name == name and s.dim == dim))


def array(tensor: Tensor) -> Scores:
    return tensor.detach().double().numpy()


def scored(name: str, method: Any, **more: Any) -> tuple[nn.Module, DependencyGraph, Scores]:
    model = ZOO[name].make()
    graph = trace(model, image())
    return model, graph, score(model, graph, method, **more)


def test_bn_is_the_mean_factor_of_all_norms_of_the_unit() -> None:
    model, graph, scores = scored("depthwise", "bn")
    expand, deep = model.expand[1].weight, model.deep[1].weight
    wanted = (array(expand).__abs__() + array(deep).__abs__()) / 2
    np.testing.assert_allclose(scores[units_of(graph, "expand.0.weight")], wanted)
    stem = units_of(graph, "stem.0.weight")
    np.testing.assert_allclose(scores[stem], array(model.stem[1].weight.abs()))


def test_negative_factors_count_by_size() -> None:
    model = ZOO["chain"].make()
    model[1].weight.data[3] = -7
    graph = trace(model, image())
    scores = score(model, graph, "bn")
    assert scores[units_of(graph, "0.weight")].argmax() == 3


def test_units_without_a_norm_compete_by_their_weights() -> None:
    model, graph, scores = scored("residual_projection", "bn")
    stream = units_of(graph, "last.weight")
    level = np.concatenate([array(model.stem[1].weight), array(model.inner[1].weight)]).mean()
    np.testing.assert_allclose(scores[stream].mean(), level)
    share = score(model, graph, "magnitude")
    np.testing.assert_allclose(scores[stream], share[stream] * level)


def test_magnitude_is_the_norm_of_all_weights_of_the_unit() -> None:
    model, graph, scores = scored("residual_projection", "magnitude")
    out = array(model.inner[0].weight) ** 2
    into = array(model.last.weight) ** 2
    norm = np.sqrt(out.sum((1, 2, 3)) + into.sum((0, 2, 3)))
    np.testing.assert_allclose(scores[units_of(graph, "inner.0.weight")], norm / norm.mean())


def test_taylor_is_gradient_times_weight_of_the_producers() -> None:
    model = ResidualProjection()
    graph = trace(model.eval(), image())
    scores = score(model, graph, "taylor", batches=[(image(), LABELS)])
    F.cross_entropy(model(image()), LABELS).backward()
    weight = model.inner[0].weight
    first = np.abs(array((weight * weight.grad).sum((1, 2, 3))))
    units = units_of(graph, "inner.0.weight")
    np.testing.assert_allclose(scores[units], first / first.mean(), rtol=1e-5)
    both = sum(
        array((w * w.grad).sum((1, 2, 3))) for w in (model.last.weight, model.shortcut.weight)
    )
    stream = units_of(graph, "last.weight")
    np.testing.assert_allclose(scores[stream], np.abs(both) / np.abs(both).mean(), rtol=1e-4)


def test_taylor_of_a_transposed_convolution() -> None:
    model = ZOO["transposed"].make()
    graph = trace(model, image())
    scores = score(model, graph, "taylor", batches=[(image(), LABELS)])
    F.cross_entropy(model(image()), LABELS).backward()
    first = np.abs(array((model.up.weight * model.up.weight.grad).sum((0, 2, 3))))
    units = units_of(graph, "up.weight", 1)
    np.testing.assert_allclose(scores[units], first / first.mean(), rtol=1e-4)


def test_taylor_adds_up_over_batches_and_leaves_the_model_alone() -> None:
    model = ZOO["chain"].make()
    model[0].weight.requires_grad_(False)
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    graph = trace(model, image())
    x = image(batch=4)
    batches = [(x[:2], LABELS), (x[2:], LABELS)]
    scores = score(model, graph, "taylor", batches=batches)
    assert [m.training for m in model.modules()] == modes
    assert not model[0].weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    together = score(model, graph, "taylor", batches=[(x, torch.cat([LABELS, LABELS]))])
    units = units_of(graph, "0.weight")
    np.testing.assert_allclose(scores[units], together[units], rtol=1e-4)
    assert scores[units].std() > 0.1


def test_nam_weighs_the_hosts_factors() -> None:
    model, graph, scores = scored("nam_attached", "nam")
    gamma = model.project.nam.channel.bn.weight
    gamma.data = torch.linspace(-1, 2, 16)
    scores = score(model, graph, "nam")
    share = np.abs(array(gamma)) / np.abs(array(gamma)).sum() * 16
    stream = units_of(graph, "stem.0.weight")
    host = array(model.stem[1].weight)
    np.testing.assert_allclose(scores[stream], host * (1 + share) / 2)
    inner = units_of(graph, "expand.0.weight")
    np.testing.assert_allclose(scores[inner], score(model, graph, "bn")[inner])


def test_auto_is_nam_where_it_is_attached() -> None:
    model, graph, auto = scored("nam_attached", "auto")
    model.project.nam.channel.bn.weight.data.uniform_(0, 2)
    assert np.array_equal(score(model, graph, "auto"), score(model, graph, "nam"))
    assert not np.array_equal(score(model, graph, "auto"), score(model, graph, "bn"))
    plain, plain_graph, _ = scored("depthwise", "auto")
    assert np.array_equal(score(plain, plain_graph), score(plain, plain_graph, "bn"))
    assert len(auto) == graph.count


def test_random_follows_its_seed() -> None:
    model, graph, first = scored("chain", "random")
    assert np.array_equal(first, score(model, graph, "random"))
    assert not np.array_equal(first, score(model, graph, "random", seed=1))


def test_a_callable_gets_model_and_graph() -> None:
    seen = []

    def mine(model: nn.Module, graph: DependencyGraph) -> Any:
        seen.append((model, graph))
        return list(range(graph.count))

    model, graph, scores = scored("chain", mine)
    assert seen == [(model, graph)]
    assert scores.dtype == np.float64
    assert np.array_equal(scores, np.arange(graph.count))


@pytest.mark.parametrize("result", [np.ones(3), float("nan"), "NaN"])
def test_a_callable_that_returns_nonsense(result: Any) -> None:
    wrong = (
        np.full(trace(ZOO["chain"].make(), image()).count, np.nan)
        if isinstance(result, str)
        else result
    )
    with pytest.raises(NamPrunerError, match="importance"):
        scored("chain", lambda model, graph: wrong)


def test_bfloat16_is_scored_in_float64() -> None:
    model = ZOO["chain"].make()
    graph = trace(model, image())
    wanted = score(model, graph, "magnitude")
    got = score(model.bfloat16(), graph, "magnitude")
    np.testing.assert_allclose(got, wanted, rtol=1e-2)
    assert got.dtype == np.float64


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("l1", "importance 'l1' is unknown; use one of auto, nam, bn"),
        ("taylor", "labelled batches"),
    ],
)
def test_what_cannot_be_scored(method: str, words: str) -> None:
    with pytest.raises(NamPrunerError, match=words):
        scored("chain", method)
