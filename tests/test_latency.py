"""Latency: order, counting and arithmetic; no time is asserted, the clock is a puppet."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from nampruner.errors import NamPrunerError
from nampruner.latency import clock as stopwatch
from nampruner.latency import compare, measure, summarize
from nampruner.plan import Latency


class Clock:
    """Time that passes only where a candidate lets it pass."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    puppet = Clock()
    monkeypatch.setattr(stopwatch, "perf_counter", puppet)
    return puppet


class Timed(nn.Module):
    """Takes `seconds` of the puppet clock, and writes down that it ran."""

    def __init__(self, clock: Clock, seconds: float, log: list[str], name: str) -> None:
        super().__init__()
        self.clock, self.seconds, self.log, self.name = clock, seconds, log, name
        self.threads: set[int] = set()
        self.modes: set[bool] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds
        self.log.append(self.name)
        self.threads.add(torch.get_num_threads())
        self.modes.add(self.training or torch.is_grad_enabled())
        return x


def pair(clock: Clock, first: float, second: float) -> tuple[dict[str, nn.Module], list[str]]:
    log: list[str] = []
    return {"a": Timed(clock, first, log, "a"), "b": Timed(clock, second, log, "b")}, log


def test_medians_are_the_candidates_own(clock: Clock) -> None:
    both, _ = pair(clock, 0.004, 0.002)

    found = measure(both, torch.zeros(3, 1), rounds=5)

    assert found["a"].median_ms == pytest.approx(4.0)
    assert found["b"].median_ms == pytest.approx(2.0)
    assert found["a"].spread_ms == pytest.approx(0.0, abs=1e-9)
    assert found["a"].batch == 3
    assert "torch" in found["a"].runtime


def test_candidates_take_turns(clock: Clock) -> None:
    both, log = pair(clock, 0.09, 0.04)

    found = measure(both, torch.zeros(1, 1), rounds=4)

    turns = [name for at, name in enumerate(log) if at == 0 or log[at - 1] != name]
    assert turns == ["a", "b"] * 5  # the warm-up, then four rounds
    # 0.5 s a turn hold 5 runs of 0.09 s and 12 of 0.04 s; the first of a turn is not counted.
    assert found["a"].runs == 4 * 4
    assert found["b"].runs == 4 * 11


def test_a_slow_network_is_not_measured_forever(clock: Clock) -> None:
    both, log = pair(clock, 3.0, 1.0)

    found = measure(both, torch.zeros(1, 1), rounds=20)

    assert found["a"].runs == found["b"].runs == 5
    assert log.count("a") == 2 + 5 * 2


def test_the_time_per_candidate_can_be_given(clock: Clock) -> None:
    both, log = pair(clock, 0.0041, 0.0022)

    measure(both, torch.zeros(1, 1), rounds=5, seconds=0.1)

    # turns of 0.02 s hold four and nine runs; six at the start warm up
    assert (log.count("a"), log.count("b")) == (6 + 5 * 4, 6 + 5 * 9)


def test_a_fast_network_does_not_exceed_its_time(clock: Clock) -> None:
    both, _ = pair(clock, 1e-5, 1e-2)

    measure(both, torch.zeros(1, 1))

    assert clock.now <= 2 * stopwatch.SECONDS_PER_CANDIDATE * 1.2


def test_threads_and_modes_are_set_and_put_back(clock: Clock) -> None:
    both, _ = pair(clock, 0.1, 0.1)
    both["a"].train()
    both["b"].eval()
    before = torch.get_num_threads()

    found = measure(both, torch.zeros(1, 1), threads=before + 1, rounds=1)

    assert found["a"].threads == before + 1
    assert both["a"].threads == {before + 1}
    assert both["a"].modes == {False}
    assert torch.get_num_threads() == before
    assert (both["a"].training, both["b"].training) == (True, False)


def test_an_onnx_file_is_timed_beside_a_module(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopwatch, "_MOST_RUNS_PER_TURN", 2)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 2]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "relu.onnx"))

    found = measure(
        {"file": tmp_path / "relu.onnx", "module": nn.ReLU()},
        np.zeros((4, 2), np.float32),
        rounds=3,
    )

    assert found["file"].runtime.startswith("onnxruntime ")
    assert found["file"].runtime.endswith("ExecutionProvider")
    assert found["file"].runs == found["module"].runs == 6
    assert found["file"].batch == 4
    with pytest.raises(NamPrunerError, match="given was float32"):
        measure({"file": tmp_path / "relu.onnx"}, np.zeros((4, 3), np.float32))


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"rounds": 0}])
def test_less_than_one_thread_or_round_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(NamPrunerError, match="at least 1"):
        measure({"a": nn.ReLU()}, torch.zeros(1), **wrong)


def test_summary_is_median_and_half_the_central_range() -> None:
    seconds = [0.001 * value for value in (5, 1, 2, 3, 4, 6, 7, 8, 9, 10, 100)]

    found = summarize([seconds[:4], seconds[4:]], threads=2, batch=8, runtime="r")

    assert found.median_ms == pytest.approx(6.0)
    # Of eleven sorted values the 10th and 90th percentile are the second and the tenth: 2 and 10.
    assert found.spread_ms == pytest.approx(4.0)
    assert (found.runs, found.threads, found.batch) == (11, 2, 8)
    assert found.turns_ms == pytest.approx((2.5, 8.0))


@pytest.mark.parametrize(("turns", "low", "high"), [(5, 1.0, 5.0), (20, 6.0, 15.0)])
def test_the_noise_is_the_sign_tests_interval_of_pairs(turns: int, low: float, high: float) -> None:
    # speed-ups 1, 2, …; of 20 the 6th to the 15th hold the true median at 95 %, of 5 all
    slow = taken(1.0, 5.0, turns_ms=tuple(float(n + 1) for n in range(turns)))
    fast = taken(1.0, 5.0, turns_ms=(1.0,) * turns)

    found = compare(slow, fast)

    assert (found.low, found.speedup, found.high) == (low, (turns + 1) / 2, high)


def test_a_machine_that_is_slow_for_a_while_is_slow_for_both() -> None:
    load = [1.0, 3.0, 1.1, 2.0, 5.0, 1.3, 1.0, 2.2]
    slow, fast = (taken(m, 5.0, turns_ms=tuple(m * x for x in load)) for m in (1.0, 0.9))
    assert compare(slow, fast).faster
    assert compare(fast, slow).slower
    assert not compare(taken(1.0, 5.0), taken(0.9, 5.0)).faster
    few = (one.model_copy(update={"turns_ms": one.turns_ms[:4]}) for one in (slow, fast))
    assert not compare(*few).outside_noise


def taken(
    median_ms: float, spread_ms: float, threads: int = 1, turns_ms: tuple[float, ...] = ()
) -> Latency:
    return Latency(
        median_ms=median_ms,
        spread_ms=spread_ms,
        turns_ms=turns_ms,
        runs=9,
        threads=threads,
        batch=1,
        runtime="r",
    )


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (taken(1.62, 0.01), taken(1.0, 0.01), "1.62× faster"),
        (taken(1.0, 0.01), taken(1.25, 0.01), "1.25× slower"),
        (taken(1.0, 0.3), taken(0.6, 0.4), "no difference outside the noise"),
        (taken(1.0, 0.0), taken(1.0, 0.0), "no difference outside the noise"),
    ],
)
def test_a_difference_inside_the_noise_is_called_that(
    first: Latency, second: Latency, said: str
) -> None:
    assert str(compare(first, second)) == said


def test_noise_is_the_root_of_the_summed_squares() -> None:
    # √(0.3² + 0.4²) = 0.5: a difference of 0.49 is inside, one of 0.51 is not.
    inside = compare(taken(2.0, 0.3), taken(1.51, 0.4))
    outside = compare(taken(2.0, 0.3), taken(1.49, 0.4))

    assert not inside.faster
    assert not inside.slower
    assert outside.faster
    assert not outside.slower


def test_different_thread_counts_are_not_compared() -> None:
    with pytest.raises(NamPrunerError, match="cannot be compared"):
        compare(taken(1, 0), taken(1, 0, threads=2))
