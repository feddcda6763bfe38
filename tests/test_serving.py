"""What users saw of a workload: times by step, percentiles and goodput by their definitions."""

import time
from dataclasses import replace

import numpy as np
import pytest

from engine import LLM
from experiments import serving, shapes
from experiments.serving import Served, figures, percentiles, serve
from experiments.workloads import Workload
from tests.checkpoints import SIZES

TINY = {name: SIZES[name] for name in SIZES if name != "eos_token_id"}
SMALL = Workload([[1, 2, 3], [4] * 20, [5]], [4, 6, 2])
FIELDS = {"num_prompt_tokens": 10, "num_cached_tokens": 0, "num_preemptions": 0}


def tiny_llm(folder, **options) -> LLM:
    shapes.write_config("Qwen3-0.6B", folder, **TINY)
    sizes = {"max_num_seqs": 4, "num_kv_blocks": 64, "max_num_batched_tokens": 64}
    options = {"enable_prefix_caching": False} | sizes | options
    return LLM(folder, device="cpu", load_format="dummy", **options)


def measure(llm, workload):
    start = time.perf_counter()
    served = serve(llm, workload, start)
    return figures(workload, served, time.perf_counter() - start)


def served(ttft_ms, tpot_ms, itl_ms=(), num_output_tokens=3) -> Served:
    times = {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms, "itl_ms": itl_ms}
    return Served(**FIELDS, num_output_tokens=num_output_tokens, **times)


def test_all_at_once(tmp_path):
    with tiny_llm(tmp_path) as llm:
        row = measure(llm, SMALL)
    assert (row["requests"], row["prompt_tokens"], row["output_tokens"]) == (3, 24, 12)
    assert row["output_tok_s"] == pytest.approx(12 / row["seconds"], rel=0.01)
    assert 0 < row["ttft_ms_p50"] <= row["ttft_ms_p99"] and row["tpot_ms_p50"] > 0
    assert row["itl_ms_mean"] is None and row["goodput_req_s"] is None
    assert row["preemptions"] == 0


def test_arrivals(tmp_path):
    workload = replace(SMALL, arrivals=[0.0, 0.05, 0.3])
    with tiny_llm(tmp_path) as llm:
        start = time.perf_counter()
        found = serve(llm, workload, start)
        assert time.perf_counter() - start >= 0.3
    assert sorted(s.num_output_tokens for s in found) == [2, 4, 6]
    for s in found:
        assert len(s.itl_ms) == s.num_output_tokens - 1 and min(s.itl_ms) >= 0
        assert s.tpot_ms == pytest.approx(sum(s.itl_ms) / len(s.itl_ms))
        assert s.ttft_ms > 0
    row = figures(workload, found, 0.5)
    assert row["goodput_req_s"] is not None and row["itl_ms_p99"] >= row["itl_ms_p50"]


class SlowLLM:
    """Gives every request a token a step, two steps each, of a clock that the test moves."""

    def __init__(self, clock):
        self.clock, self.added, self.left = clock, [], {}

    def add_request(self, prompt, params):
        self.added.append(self.clock.now)
        self.left[len(self.added)] = 2
        return len(self.added)

    def is_finished(self):
        return not self.left

    def step(self):
        self.clock.now += 1.0
        outputs = []
        for request_id in list(self.left):
            self.left[request_id] -= 1
            is_last = not self.left[request_id]
            outputs.append({"request_id": request_id, "new_token_ids": [0], "finished": is_last})
            if is_last:
                del self.left[request_id]
                counts = {"num_generated_tokens": 2, "ttft_ms": -1, "tpot_ms": -1}
                outputs[-1]["metrics"] = FIELDS | counts
        return outputs


class Clock:
    """Sleeping moves it; nothing else does."""

    def __init__(self):
        self.now, self.naps = 100.0, []

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.naps.append(seconds)
        self.now += seconds


def test_times_are_those_of_the_steps_and_count_from_when_a_request_was_due(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(serving, "time", clock)
    llm = SlowLLM(clock)
    # the second is due within the first's first step, the third when all is done
    workload = Workload([[1], [2], [3]], [2, 2, 2], [0.5, 0.75, 10.0])
    found = serve(llm, workload, start=100.0)
    assert clock.naps == [0.5, 110.0 - 103.5]  # none while something runs
    assert llm.added == [100.5, 101.5, 110.0]
    assert [s.ttft_ms for s in found] == [1000.0, 1750.0, 1000.0]
    assert [s.itl_ms for s in found] == [(1000.0,)] * 3
    assert [s.tpot_ms for s in found] == [1000.0] * 3


def test_percentiles_are_numpys():
    values = list(np.random.default_rng(0).exponential(10, 333))
    found = percentiles("x", [*values, None])
    assert found["x_mean"] == pytest.approx(np.mean(values), abs=1e-3)
    ordered = sorted(values)
    assert found["x_p50"] == pytest.approx(ordered[166], abs=1e-3)
    place = 0.99 * 332  # between the neighbours, by linear interpolation
    low, high = ordered[int(place)], ordered[int(place) + 1]
    assert found["x_p99"] == pytest.approx(low + (high - low) * (place - int(place)), abs=1e-3)
    assert percentiles("x", [None]) == {"x_mean": None, "x_p50": None, "x_p99": None}


def test_goodput_counts_those_within_both_limits():
    found = [
        served(500.0, 20.0),
        served(500.1, 1.0),
        served(1.0, 20.1),
        served(1.0, None, num_output_tokens=1),
    ]
    assert [s.is_good for s in found] == [True, False, False, True]
    workload = Workload([[1]] * 4, [3, 3, 3, 1], [0.0] * 4)
    row = figures(workload, found, seconds=4.0)
    assert (row["goodput_req_s"], row["output_tok_s"]) == (0.5, 2.5)
    assert row["tpot_ms_mean"] == pytest.approx((20 + 1 + 20.1) / 3, abs=1e-3)
    assert figures(replace(workload, arrivals=None), found, 4.0)["goodput_req_s"] is None


def test_gaps_of_all_requests_count_alike():
    found = [served(1.0, 2.0, (1.0, 3.0)), served(1.0, 8.0, (8.0,), num_output_tokens=2)]
    row = figures(Workload([[1]] * 2, [3, 2], [0.0, 0.0]), found, seconds=1.0)
    assert (row["itl_ms_mean"], row["itl_ms_p50"]) == (4.0, 3.0)
    assert row["tpot_ms_mean"] == 5.0


def test_what_is_no_measurement_is_refused(tmp_path):
    with tiny_llm(tmp_path, enable_prefix_caching=True) as llm:
        measure(llm, SMALL)
        with pytest.raises(AssertionError, match="prefix cache"):
            measure(llm, SMALL)
    with tiny_llm(tmp_path, max_model_len=22) as llm:
        with pytest.raises(AssertionError, match="ended early"):
            measure(llm, SMALL)
    with pytest.raises(AssertionError, match="lost"):
        figures(Workload([[1]] * 2, [3, 3]), [served(1.0, 1.0)], 1.0)
