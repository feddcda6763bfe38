"""Counters and percentiles, by themselves and as an LLM shows them."""

import json
import time

import pytest
import torch

from engine.kv_cache import block_bytes
from engine.request import Request, SamplingParams
from engine.stats import LATENCIES, PERCENTILES, WINDOW, EngineStats, HandoffStats
from models.config import ModelConfig
from tests.checkpoints import save_byte_model
from tests.test_llm import greedy, run_all, small_llm


def ended(reason="length", num_generated=3, arrival=1.0, first=1.5, finished=2.5) -> Request:
    request = Request(0, [1, 2], SamplingParams(), arrival_time=arrival)
    request.token_ids.extend([5] * num_generated)
    request.first_scheduled_time = arrival + 0.1
    request.first_token_time, request.finished_time = first, finished
    request.last_token_time = finished
    request.finish_reason = reason
    return request


def test_a_new_engine_has_done_nothing():
    stats = EngineStats().as_dict()
    assert stats.pop("finished") == {}
    nothing_yet = (*LATENCIES, "itl_ms", "prefill_utilisation", "decode_utilisation")
    assert [stats.pop(name) for name in nothing_yet] == [None] * len(nothing_yet)
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


def test_tokens_are_timed_from_one_to_the_next():
    stats, request = EngineStats(), Request(0, [1], SamplingParams())
    for now in (2.0, 2.25, 3.0):
        stats.token_taken(request, now)
    assert (request.first_token_time, request.last_token_time) == (2.0, 3.0)
    assert stats.as_dict()["itl_ms"]["p50"] == pytest.approx(500.0)


def test_utilisation_counts_while_there_are_requests(monkeypatch):
    stats, clock = EngineStats(), [10.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    for _ in range(2):
        stats.is_active(clock[0])
        stats.is_active(clock[0] + 0.5)
        stats.device_was_busy("prefill", 300.0)
        stats.device_was_busy("decode", 500.0)
        clock[0] += 1.0
        assert stats.as_dict()["prefill_utilisation"] == pytest.approx(0.3)
        stats.is_idle()
        stats.is_idle()
        clock[0] += 5.0
    shown = stats.as_dict()
    assert (shown["active_ms"], shown["decode_busy_ms"]) == pytest.approx((2000.0, 1000.0))
    assert shown["decode_utilisation"] == pytest.approx(0.5)


@pytest.mark.parametrize("two", [False, True], ids=["one device", "two devices"])
@pytest.mark.parametrize("how", ["close", "abort"])
def test_a_cancelled_request_is_active_no_longer(tmp_path, how, two):
    save_byte_model(tmp_path, "qwen3")
    with small_llm(tmp_path, enable_two_gpu_pd=two) as llm:
        if how == "close":
            pieces = llm.stream("abc", greedy(50, ignore_eos=True))
            next(pieces)
            pieces.close()
        else:
            request_id = llm.add_request("abc", greedy(50, ignore_eos=True))
            for _ in range(4):
                llm.step()
            llm.abort(request_id)
        before = llm.stats()
        time.sleep(0.01)
        after = llm.stats()
        assert after["active_ms"] == before["active_ms"] > 0
        assert after["decode_utilisation"] == before["decode_utilisation"]
        run_all(llm)


def test_graphs_of_both_workers_are_counted():
    stats = EngineStats()
    assert stats.as_dict()["graph_bytes"] == 0
    stats.graphs_captured(3, 20.0, 1 << 20)
    stats.graphs_captured(4, 10.0, 1 << 21)
    shown = stats.as_dict()
    assert (shown["num_graphs"], shown["capture_ms"]) == (7, 30.0)
    assert shown["graph_bytes"] == 3 << 20


def test_hand_overs_are_counted():
    stats = HandoffStats()
    assert stats.as_dict() == {
        "num_handoffs": 0, "num_bytes": 0, "copy_ms": 0.0, "gb_s": None, "exposed_ms": None,
    }  # fmt: skip
    stats.handed_over(3, 4_000_000, 2.0)
    stats.handed_over(1, 0, 0.0)
    stats.decode_waited(1.5)
    shown = stats.as_dict()
    assert (shown["num_handoffs"], shown["gb_s"]) == (4, 2.0)
    assert shown["exposed_ms"]["p99"] == 1.5


def test_one_device_and_two_show_the_same_keys(tmp_path, capsys):
    folder, shown = save_byte_model(tmp_path), []
    for two in (False, True):
        with small_llm(folder, enable_two_gpu_pd=two) as llm:
            json.dumps(llm.stats())
            llm.print_statistics()
            llm.generate(["a" * 40, "b"], greedy(6, ignore_eos=True))
            llm.print_statistics()
            shown.append(llm.stats())
            json.dumps(shown[-1])
            told = capsys.readouterr().out
            assert ("hand-over" in told) == two
            assert "prefill   41 tokens in 1 launches" in told
            assert "decode    10 tokens in 5 launches" in told
    one, two = shown
    assert one.keys() == two.keys() and one["handoff"] is None
    for stats in shown:
        assert 0 < stats["prefill_busy_ms"] + stats["decode_busy_ms"] <= stats["active_ms"]
        assert stats["itl_ms"]["p50"] > 0
    assert (two["num_kv_blocks"], two["num_prefill_kv_blocks"]) == (64, 32)
    handoff = two["handoff"]
    assert (handoff["num_handoffs"], handoff["mode"], handoff["way"]) == (2, "auto", "kernel")
    assert handoff["num_bytes"] == 4 * fp32_block_bytes(folder) and handoff["gb_s"] > 0
    assert (handoff["num_in_flight"], handoff["backlog"], handoff["credits"]) == (0, 0, 64)


def fp32_block_bytes(folder) -> int:
    """Of a block of 16 tokens in fp32."""
    config = ModelConfig.from_folder(folder)
    return block_bytes(config, 16, torch.float32)


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
