"""Interference: which gaps count, that prompts never run out, and the ratios beside their aims."""

import csv

import pytest

from experiments import interference, shapes
from experiments.interference import AIMS, Sizes, decode_beside, prefill_alone, summary
from experiments.workloads import MAX_TOKEN_ID
from tests.checkpoints import SIZES

SMALL = Sizes(
    num_requests=3,
    context=10,
    output_len=12,
    first_token=4,
    prompt_len=20,
    num_queued=4,
    alone_seconds=0.1,
)
TINY = {name: SIZES[name] for name in SIZES if name != "eos_token_id"}


class FakeLLM:
    """A step gives all requests a token: 1 s of a clock, 10 s for the first, 1.5 s beside
    prompts, of which one ends a step."""

    def __init__(self):
        self.now, self.left, self.num_added, self.most_prompts = 0.0, {}, 0, 0
        self.perf_counter = lambda: self.now

    def add_request(self, prompt, params):
        self.num_added += 1
        self.left[self.num_added] = params.max_tokens
        return self.num_added

    def abort(self, request_id):
        return self.left.pop(request_id, None) is not None

    def is_finished(self):
        return not self.left

    def step(self):
        prompts = [r for r, n in self.left.items() if n == 1 and r > SMALL.num_requests]
        self.most_prompts = max(self.most_prompts, len(prompts))
        self.now += 10.0 if not self.now else 1.5 if prompts else 1.0
        ended = prompts[:1]
        outputs = []
        for request_id in list(self.left):
            if request_id in prompts and request_id not in ended:
                continue
            self.left[request_id] -= 1
            is_last = not self.left[request_id]
            outputs.append({"request_id": request_id, "new_token_ids": [0], "finished": is_last})
            if is_last:
                del self.left[request_id]
        return outputs


@pytest.mark.parametrize(
    ("is_busy", "gap_ms", "rate"), [(False, 1e3, 0.0), (True, 1.5e3, 20 / 1.5)]
)
def test_gaps_behind_the_first_tokens_count(is_busy, gap_ms, rate, monkeypatch):
    llm = FakeLLM()
    monkeypatch.setattr(interference, "time", llm)
    found = decode_beside(llm, SMALL, is_busy=is_busy)
    # the slow first step lies before them
    assert [found[f"itl_ms_{of}"] for of in ("mean", "p50", "p99")] == [gap_ms] * 3
    assert found["prefill_tok_s"] == pytest.approx(rate, abs=0.1)
    assert llm.is_finished() and llm.most_prompts == (4 if is_busy else 0)


def test_prefill_alone_counts_prompts(monkeypatch):
    llm = FakeLLM()
    llm.num_added = SMALL.num_requests
    monkeypatch.setattr(interference, "time", llm)
    found = prefill_alone(llm, SMALL)
    assert (
        found["prefill_tok_s"] == pytest.approx(20 / 1.5, abs=0.1) and found["itl_ms_p50"] is None
    )
    assert llm.is_finished() and llm.most_prompts == 4


def rows(idle, busy):
    common = {"model": "m", "config": "pd", "itl_ms_p50": 0.0}
    return [
        common | {"prefill": prefill, "prefill_tok_s": rate, "itl_ms_mean": ms, "itl_ms_p99": ms}
        for prefill, rate, ms in (
            ("alone", 200.0, None),
            ("idle", 0.0, idle),
            ("idle", 0.0, idle),
            ("idle", 0.0, 100 * idle),
            ("busy", 150.0, busy),
        )
    ]


def test_the_summary_holds_medians_against_the_aims():
    assert AIMS == {"itl_ms_p99": 1.10, "itl_ms_mean": 1.05}
    text = summary(rows(2.0, 2.14))
    assert "itl_ms_p99 2.000 -> 2.140 (1.070x, aim 1.10x: holds)" in text
    assert "itl_ms_mean 2.000 -> 2.140 (1.070x, aim 1.05x: missed)" in text
    assert text.startswith("m pd: ") and text.endswith("prefill 150 tok/s, 75% of 200 alone")


@pytest.mark.parametrize("config", ["one", "pd"])
def test_the_command_writes_a_row_for_each_reading(config, tmp_path, monkeypatch, capsys):
    sizes = TINY | {"vocab_size": MAX_TOKEN_ID + 1, "max_position_embeddings": 8192}
    monkeypatch.setattr("engine.kv_cache.CPU_CACHE_BYTES", 1 << 24)
    model, out = shapes.write_config("Qwen3-0.6B", tmp_path / "tiny", **sizes), tmp_path / "i.csv"
    argv = ["--config", config, "--device", "cpu", "--rounds", "2", "--out", str(out)]
    interference.main([*argv, "--model", str(model)], SMALL)
    found = list(csv.DictReader(out.open()))
    assert [row["prefill"] for row in found] == ["alone", "idle", "busy", "idle", "busy"]
    for row in found:
        assert (row["model"], row["config"]) == ("tiny", config)
        assert (row["requests"], row["context"], row["prompt_len"]) == ("3", "10", "20")
        assert (float(row["prefill_tok_s"]) > 0) == (row["prefill"] != "idle")
        assert bool(row["itl_ms_p99"]) == (row["prefill"] != "alone")
    assert f"tiny {config}: itl_ms_p99" in capsys.readouterr().out
