"""The engine benchmark: its workloads are the ones it names, and a row holds what was measured."""

import csv
import json
import re

import pytest
import torch
import triton

from engine import LLM
from experiments import bench_engine, harness, shapes
from experiments.bench_engine import WORKLOADS, Workload, measure
from models.config import ModelConfig
from tests.checkpoints import SIZES

TINY = {name: SIZES[name] for name in SIZES if name != "eos_token_id"}


def tiny_llm(folder, **options) -> LLM:
    shapes.write_config("Qwen3-0.6B", folder, **TINY)
    sizes = {"max_num_seqs": 4, "num_kv_blocks": 64, "max_num_batched_tokens": 64}
    options = {"enable_prefix_caching": False} | sizes | options
    return LLM(folder, device="cpu", load_format="dummy", **options)


SMALL = Workload([[1, 2, 3], [4] * 20, [5]], [4, 6, 2])


def test_the_offline_workload_is_the_usual_one():
    workload = WORKLOADS["offline"]()
    lens = [len(prompt) for prompt in workload.prompts]
    assert len(lens) == len(workload.output_lens) == 256
    for found in (lens, workload.output_lens):
        assert 100 <= min(found) < 130 and 1000 < max(found) <= 1024
    token_ids = {token_id for prompt in workload.prompts for token_id in prompt}
    assert min(token_ids) == 0 and max(token_ids) == 10_000
    again = WORKLOADS["offline"]()
    assert (again.prompts, again.output_lens) == (workload.prompts, workload.output_lens)


@pytest.mark.parametrize(("name", "shape"), [("batch1", (1, 128, 256)), ("fixed", (256, 512, 128))])
def test_the_other_workloads_have_one_shape(name, shape):
    workload = WORKLOADS[name]()
    num_requests, prompt_len, output_len = shape
    assert [len(prompt) for prompt in workload.prompts] == [prompt_len] * num_requests
    assert workload.output_lens == [output_len] * num_requests


def test_requests_run_to_their_full_length_at_0_6():
    for p, num_tokens in zip(SMALL.params, SMALL.output_lens, strict=True):
        assert (p.temperature, p.ignore_eos, p.max_tokens) == (0.6, True, num_tokens)
        assert (p.top_k, p.top_p, p.min_p) == (0, 1.0, 0.0)


def test_measure_counts_what_was_done(tmp_path):
    with tiny_llm(tmp_path) as llm:
        row = measure(llm, SMALL)
    assert (row["requests"], row["prompt_tokens"], row["output_tokens"]) == (3, 24, 12)
    assert row["output_tok_s"] == pytest.approx(12 / row["seconds"], rel=0.01)
    assert row["ttft_ms_median"] > 0 and row["tpot_ms_median"] > 0
    assert row["preemptions"] == 0


def test_measure_refuses_what_is_no_measurement(tmp_path):
    with tiny_llm(tmp_path, enable_prefix_caching=True) as llm:
        measure(llm, SMALL)
        with pytest.raises(AssertionError, match="prefix cache"):
            measure(llm, SMALL)
    with tiny_llm(tmp_path, max_model_len=22) as llm:
        with pytest.raises(AssertionError, match="ended early"):
            measure(llm, SMALL)


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_are_those_of_the_models_they_name(name, tmp_path):
    c = ModelConfig.from_folder(shapes.write_config(name, tmp_path / name))
    attention = (c.qkv_size + c.num_heads * c.head_dim) * c.hidden_size + 2 * c.head_dim
    layer = attention + 3 * c.intermediate_size * c.hidden_size + 2 * c.hidden_size
    embeddings = (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.hidden_size
    num_parameters = c.num_layers * layer + embeddings + c.hidden_size
    billions = {"Qwen3-0.6B": 0.596, "Qwen3-4B": 4.022, "Qwen3-8B": 8.191}
    assert num_parameters / 1e9 == pytest.approx(billions[name], abs=0.001)
    assert c.dtype == "bfloat16" and c.qk_norm


def test_changes_of_a_shape_are_written(tmp_path):
    shapes.write_config("Qwen3-8B", tmp_path, num_hidden_layers=2)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 2
    assert shapes.SHAPES["Qwen3-8B"]["num_hidden_layers"] == 36


def test_the_command_writes_a_row_for_each_reading(tmp_path, monkeypatch, capsys):
    def write_tiny(model, folder):
        return shapes.write_config(model, folder, **TINY)

    monkeypatch.setattr(bench_engine, "write_config", write_tiny)
    monkeypatch.setitem(bench_engine.WORKLOADS, "batch1", lambda: SMALL)
    monkeypatch.setattr("engine.kv_cache.CPU_CACHE_BYTES", 1 << 20)
    out = tmp_path / "results" / "engine.csv"
    argv = ["--workload", "batch1", "--device", "cpu", "--max-model-len", "400", "--out", str(out)]
    bench_engine.main([*argv, "--repeat", "2"])
    bench_engine.main([*argv, "--repeat", "1", "--enforce-eager"])
    rows = list(csv.DictReader(out.open()))
    assert [row["eager"] for row in rows] == ["False", "False", "True"]
    for row in rows:
        assert (row["model"], row["workload"]) == ("Qwen3-0.6B", "batch1")
        assert row["output_tokens"] == "12" and float(row["output_tok_s"]) > 0
        assert row["gpu"].startswith("cpu") and row["commit"]
    assert "output_tok_s" in capsys.readouterr().out


def test_rows_are_appended_under_one_header(tmp_path):
    path = tmp_path / "new" / "x.csv"
    harness.append_row(path, {"a": 1, "b": "x, y"})
    harness.append_row(path, {"a": 2.5, "b": ""})
    assert path.read_text().split() == ["a,b", '1,"x,', 'y"', "2.5,"]
    assert list(csv.DictReader(path.open())) == [{"a": "1", "b": "x, y"}, {"a": "2.5", "b": ""}]


@pytest.mark.parametrize("row", [{"a": 1}, {"b": 1, "a": 2}, {"a": 1, "b": 2, "c": 3}])
def test_a_row_of_other_columns_is_refused(row, tmp_path):
    path = tmp_path / "x.csv"
    harness.append_row(path, {"a": 1, "b": 2})
    before = path.read_text()
    with pytest.raises(ValueError, match=r"must have the columns .*, got \['a', 'b'\]"):
        harness.append_row(path, row)
    assert path.read_text() == before


def test_the_stamp_of_a_run(monkeypatch):
    monkeypatch.delenv("GREENLANE_COMMIT", raising=False)
    stamp = harness.environment("cpu")
    assert list(stamp) == ["date", "gpu", "torch", "triton", "driver", "commit"]
    assert (stamp["torch"], stamp["triton"]) == (torch.__version__, triton.__version__)
    assert stamp["gpu"].startswith("cpu ") and stamp["driver"] == ""
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", stamp["commit"])
    monkeypatch.setenv("GREENLANE_COMMIT", "abc1234")
    assert harness.environment("cpu")["commit"] == "abc1234"


def test_outside_git_the_commit_is_unknown(monkeypatch, tmp_path):
    monkeypatch.delenv("GREENLANE_COMMIT", raising=False)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert harness.environment("cpu")["commit"] == "unknown"


def test_a_table_is_aligned():
    rows = [{"name": "a", "value": 1234.5678, "x": 0}, {"name": "long", "value": 2.0, "x": 0}]
    lines = harness.table(rows, ["name", "value"]).splitlines()
    assert lines == ["name  value", "   a   1235", "long      2"]
