"""Counters and percentiles, by themselves and as an LLM shows them."""

import json

import pytest

from engine.request import Request, SamplingParams
from engine.stats import LATENCIES, PERCENTILES, WINDOW, EngineStats
from tests.checkpoints import save_byte_model
from tests.test_llm import greedy, run_all, small_llm


def ended(reason="length", num_generated=3, arrival=1.0, first=1.5, finished=2.5) -> Request:
    request = Request(0, [1, 2], SamplingParams(), arrival_time=arrival)
    request.token_ids += [5] * num_generated
    request.first_scheduled_time = arrival + 0.1
    request.first_token_time, request.finished_time = first, finished
    request.finish_reason = reason
    return request


def test_a_new_engine_has_done_nothing():
    stats = EngineStats().as_dict()
    assert stats.pop("finished") == {}
    assert [stats.pop(name) for name in LATENCIES] == [None] * len(LATENCIES)
    assert set(stats.values()) == {0}


def test_launches_and_ends_are_counted():
    stats = EngineStats()
    stats.prefill_launched(100)
    stats.prefill_launched(28)
    for _ in range(3):
        stats.decode_launched(7)
    for reason in ("stop", "length", "stop", "abort"):
        request = ended(reason)
        request.num_cached_tokens, request.num_preemptions = 16, 2
        stats.request_finished(request)
    shown = stats.as_dict()
    assert (shown["num_prefill_launches"], shown["num_prefill_tokens"]) == (2, 128)
    assert (shown["num_decode_launches"], shown["num_decode_tokens"]) == (3, 21)
    assert (shown["num_cached_tokens"], shown["num_preemptions"]) == (64, 8)
    assert shown["finished"] == {"stop": 2, "length": 1, "abort": 1}


def test_percentiles_are_in_milliseconds():
    stats = EngineStats()
    for i in range(1, 101):
        stats.request_finished(ended(first=1.0 + i / 100, finished=2.0 + i / 100))
    shown = stats.as_dict()
    assert shown["ttft_ms"] == pytest.approx({"p50": 505.0, "p90": 901.0, "p99": 990.1})
    assert shown["tpot_ms"] == pytest.approx({f"p{p}": 500.0 for p in PERCENTILES})
    assert shown["queue_ms"]["p50"] == pytest.approx(100.0)


def test_a_request_that_never_ran_has_no_times_to_count():
    stats, request = EngineStats(), Request(0, [1], SamplingParams(), arrival_time=1.0)
    request.finish_reason, request.finished_time = "abort", 2.0
    stats.request_finished(request)
    shown = stats.as_dict()
    assert shown["ttft_ms"] is shown["tpot_ms"] is shown["queue_ms"] is None
    assert shown["latency_ms"]["p50"] == pytest.approx(1000.0)


def test_the_window_is_bounded_and_the_dict_a_copy():
    stats = EngineStats()
    for _ in range(WINDOW + 10):
        stats.request_finished(ended())
    assert len(stats._latencies) == WINDOW
    shown = stats.as_dict()
    assert shown["finished"] == {"length": WINDOW + 10}
    shown["finished"]["length"] = 0
    assert stats.finished == {"length": WINDOW + 10}


def test_stats_of_an_llm(tmp_path):
    with small_llm(save_byte_model(tmp_path), max_num_seqs=2) as llm:
        ids = [llm.add_request("abc", greedy(5, ignore_eos=True)) for _ in range(3)]
        assert llm.stats()["num_waiting"] == 3
        llm.step()
        assert (llm.stats()["num_waiting"], llm.stats()["num_running"]) == (1, 2)
        assert llm.stats()["num_free_kv_blocks"] == llm.stats()["num_kv_blocks"] - 2
        llm.abort(ids[2])
        run_all(llm)
        stats = llm.stats()
        json.dumps(stats)
        assert (stats["num_prefill_launches"], stats["num_prefill_tokens"]) == (1, 6)
        assert stats["num_decode_tokens"] == 2 * 4, "the first token of each is prefill's"
        assert stats["finished"] == {"abort": 1, "length": 2}
        assert stats["ttft_ms"]["p50"] <= stats["latency_ms"]["p99"]
