"""The engine benchmark: configurations, the rates of arrivals, and a row for what was measured."""

import csv
import itertools
import json
import re
from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import triton

from experiments import bench_engine, claims, engine_sets, harness, shapes
from experiments.engine_csv import FORMER_HEADERS, read_engine_csv
from experiments.engine_sets import CONFIGS, engine_options
from experiments.serving import Served
from experiments.workloads import BURSTS, CLOSED, MAX_TOKEN_ID, POISSON, Poisson, at_once
from models.config import ModelConfig
from tests.checkpoints import SIZES
from tests.test_engine_csv import FIRST

TINY = {name: SIZES[name] for name in SIZES if name != "eos_token_id"}


@pytest.mark.parametrize("name", [n for n in shapes.SHAPES if n not in shapes.STAND_INS])
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


@pytest.fixture
def argv(tmp_path, monkeypatch):
    """A model and workloads that run in no time."""
    folder = shapes.write_config(
        "Qwen3-0.6B", tmp_path / "tiny", **TINY | {"vocab_size": MAX_TOKEN_ID + 1}
    )
    poisson = Poisson(20, 4, seconds=0.5, num_burst_requests=6)
    monkeypatch.setitem(CLOSED, "decode-heavy-4", lambda: at_once(3, 20, 5))
    monkeypatch.setitem(CLOSED, poisson.burst_name, poisson.burst)
    monkeypatch.setitem(POISSON, "poisson-1024-128", poisson)
    out = str(tmp_path / "results" / "engine.csv")
    sizes = ["--max-model-len", "400", "--num-kv-blocks", "200"]
    return ["--model", str(folder), "--device", "cpu", *sizes, "--out", out]


def test_the_command_writes_a_row_for_each_reading(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine_sets, "MAX_READINGS", 2)
    monkeypatch.setattr(engine_sets, "READ_SECONDS", 1e9)  # on no machine fewer
    out = tmp_path / "results" / "engine.csv"
    out.parent.mkdir()
    out.write_text(f"{FORMER_HEADERS[0]}\n{FIRST}\n")
    options = ["--configs", "pd_pipeline", "pd", "replicas", "one", "--loads", "0.2", "0.4"]
    options += ["--workloads", "poisson-1024-128", "decode-heavy-4", "--max-num-seqs", "4"]
    bench_engine.main([*argv, *options])
    first, *rows = read_engine_csv(out)
    assert (first.model, first.config) == ("Qwen3-8B", "one")
    assert Counter((r.config, r.gpus, r.max_num_seqs, r.workload) for r in rows) == {
        ("one", 1, 4, "decode-heavy-4"): 2,
        ("replicas", 2, 4, "decode-heavy-4"): 2,
        ("replicas", 2, 4, "burst-20-4"): 2,
        ("replicas", 2, 4, "poisson-1024-128"): 2,
        ("pd", 2, 4, "decode-heavy-4"): 2,
        ("pd", 2, 4, "poisson-1024-128"): 2,
        ("pd_pipeline", 2, 4, "decode-heavy-4"): 2,
        ("pd_pipeline", 2, 4, "poisson-1024-128"): 2,
    }
    assert len({r.run for r in rows}) == 1 and rows[0].model == "tiny"
    assert rows[0].gpu.startswith("cpu ") and rows[0].commit
    for r in rows:
        if r.workload == "decode-heavy-4":
            assert (r.requests, r.prompt_tokens, r.output_tokens) == (3, 60, 15)
            assert 0 < r.ttft_ms_p50 < 1e3 * r.seconds and r.tpot_ms_p50 > 0
    capacity = max(6 / r.seconds for r in rows if r.workload == "burst-20-4")
    arrivals = [r for r in rows if r.load is not None]
    assert [(r.config, r.load) for r in arrivals] == [
        (config, load) for config in CONFIGS[1:] for load in (0.2, 0.4)
    ]
    for r in arrivals:
        assert r.rate == pytest.approx(r.load * capacity, rel=0.01)
        assert r.requests == max(1, round(r.load * capacity * 0.5))
        assert r.output_tokens == 4 * r.requests and r.itl_ms_p50 > 0
        assert r.goodput_req_s <= 1.01 * r.requests / r.seconds
    printed = capsys.readouterr().out
    assert "tiny one and replicas: up" in printed and "tiny pd: up" in printed
    assert len(printed.splitlines()) == 1 + 3 + 4 + 7  # header, sets, closed, of Poisson arrivals
    claims.main(["--from", str(out), "--model", "tiny", "--csv", str(tmp_path / "claims.csv")])
    assert "| 3 | decode-heavy, 4 prompts, throughput | tiny | 1.20x |" in capsys.readouterr().out


class InstantReplicas:
    """Serves at once and says that it took as many seconds as there are engines, pd four."""

    failing: str | None = None  # serving these, "mixed" or "pd", it fails
    seconds: ClassVar[list[float]] = []  # of each run, rehearsals included

    def __init__(self, folder, options):
        self.environment = harness.environment("cpu")
        self.kind = "pd" if "enable_two_gpu_pd" in options[0] else "mixed"
        self.num_engines = len(options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def run(self, workload, num_engines=None):
        if self.kind == self.failing:
            raise RuntimeError("engine 0 ended: no memory")
        counts = {"num_cached_tokens": 0, "num_preemptions": 0}
        times = {"ttft_ms": 1.0, "tpot_ms": 1.0}
        served = [
            Served(num_prompt_tokens=len(p), num_output_tokens=n, **counts, **times)
            for p, n in zip(workload.prompts, workload.output_lens, strict=True)
        ]
        seconds = 4.0 if self.kind == "pd" else float(num_engines or self.num_engines)
        InstantReplicas.seconds.append(seconds)
        return served, seconds


@pytest.fixture
def instant(monkeypatch):
    monkeypatch.setattr(engine_sets, "Replicas", InstantReplicas)
    monkeypatch.setattr(InstantReplicas, "seconds", [])
    return monkeypatch


def rates(argv, tmp_path, *configs) -> dict[str, list[float]]:
    """Of the Poisson arrivals, by configuration, in the order of the run."""
    bench_engine.main([*argv, "--configs", *configs, "--workloads", "poisson-1024-128"])
    found: dict[str, list[float]] = {}
    for r in read_engine_csv(tmp_path / "results" / "engine.csv"):
        found.setdefault(r.config, []).extend([] if r.rate is None else [r.rate])
    return found


def test_replicas_and_pd_get_the_same_rates_and_one_none(argv, tmp_path, instant):
    found = rates(argv, tmp_path, "pd", "one", "replicas")
    of_replicas = pytest.approx([load * 6 / 2 for load in (0.5, 0.7, 0.9)])
    assert list(found.items()) == [("replicas", of_replicas), ("pd", of_replicas)]


def test_without_replicas_each_has_its_own_capacity(argv, tmp_path, instant):
    found = rates(argv, tmp_path, "one", "pd")
    for config, seconds in (("one", 1), ("pd", 4)):
        assert found[config] == pytest.approx([load * 6 / seconds for load in (0.5, 0.7, 0.9)])


def test_quick_leaves_out_and_makes_nothing_smaller(argv, tmp_path, instant):
    bench_engine.main([*argv, "--quick"])
    rows = read_engine_csv(tmp_path / "results" / "engine.csv")
    names = {*bench_engine.QUICK_WORKLOADS, "burst-20-4"}
    assert {r.workload for r in rows} == names and names < {*CLOSED, *POISSON}
    for r in rows:
        if r.load is None:
            assert r.requests == len(CLOSED[r.workload]().prompts)
    assert [r.load for r in rows if r.load is not None] == [0.8]


def test_all_is_measured_but_bursts_for_themselves():
    assert sorted([*bench_engine.WORKLOADS, *BURSTS]) == sorted([*CLOSED, *POISSON])


def test_short_workloads_are_read_again(argv, tmp_path, instant):
    """Until two seconds are measured: they take one second on one device, two on replicas. Those
    that are up together take turns."""
    bench_engine.main([*argv, "--configs", "one", "replicas", "--workloads", "decode-heavy-4"])
    rehearsal, *readings = InstantReplicas.seconds
    assert (rehearsal, readings) == (2.0, [1.0, 2.0, 1.0])
    instant.setattr(engine_sets, "READ_SECONDS", 100.0)
    bench_engine.main([*argv, "--workloads", "decode-heavy-4"])
    bench_engine.main([*argv, "--workloads", "decode-heavy-4", "--repeat", "9"])
    rows = read_engine_csv(tmp_path / "results" / "engine.csv")
    assert [r.config for r in rows[:3]] == ["one", "one", "replicas"]
    assert len(rows[3:]) == engine_sets.MAX_READINGS + 9


def test_a_configuration_that_fails_costs_no_other_one(argv, tmp_path, instant, capsys):
    workloads = ["--workloads", "decode-heavy-4", "poisson-1024-128", "fixed"]
    instant.setattr(InstantReplicas, "failing", "mixed")
    with pytest.raises(SystemExit) as failure:
        bench_engine.main([*argv, "--configs", "one", "replicas", "pd", *workloads])
    assert failure.value.code == 1
    assert "['one', 'replicas']: engine 0 ended: no memory" in capsys.readouterr().err
    rows = read_engine_csv(tmp_path / "results" / "engine.csv")
    # nobody knows the rates of the replicas: arrivals at others would tell nothing
    assert [(r.config, r.workload) for r in rows] == [("pd", "decode-heavy-4"), ("pd", "fixed")]


def test_time_is_shared_out_and_no_workload_begun_behind_it(argv, tmp_path, instant, capsys):
    """Each look at the clock takes a second, one before a workload and one for its line: the
    first set has until second 1 + 3/4 * 13, the second one, begun in second 12, until 14."""
    now = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(now)))
    instant.setattr(bench_engine, "time", clock)
    workloads = ["offline", "short-prompts", "decode-heavy-4", "decode-heavy-256", "fixed"]
    options = ["--configs", "one", "pd", "--max-seconds", "14", "--workloads", *workloads]
    bench_engine.main([*argv, *options])
    found: dict[str, list[str]] = {}
    for r in read_engine_csv(tmp_path / "results" / "engine.csv"):
        if r.workload not in found.setdefault(r.config, []):
            found[r.config].append(r.workload)
    assert found == {"one": workloads[:4]}
    told = capsys.readouterr().err.splitlines()
    assert told == [f"no time left for {w} and what follows" for w in ("fixed", "offline")]


def test_configurations():
    one, other = ({"device": f"cuda:{i}"} for i in range(2))
    assert engine_options("one", "cuda") == [one]
    assert engine_options("replicas", "cuda") == [one, other]
    assert engine_options("replicas", "cpu") == [{"device": "cpu"}] * 2
    both = {"enable_two_gpu_pd": True, "prefill_device_id": 0, "decode_device_id": 1}
    assert engine_options("pd", "cpu") == [{"device": "cpu"} | both]
    assert engine_options("pd_pipeline", "cuda") == [
        {"device": "cuda", "enable_decode_pipeline": True} | both
    ]


def test_no_closed_workload_has_more_requests_than_an_engine_decodes_at_a_time():
    limit = bench_engine._parse(["--device", "cpu"]).max_num_seqs
    assert max(len(workload().prompts) for workload in CLOSED.values()) == limit


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--model", "nowhere"],
            "--model: must be one of Qwen3-0.6B, .* or a folder, got 'nowhere'",
        ),
        (["--loads", "0.5", "0"], "must be positive, got"),
        (["--repeat", "0"], "must be positive, got"),
        (["--device", "cuda", "--configs", "pd"], "must have 2 GPUs, got 0"),
    ],
)
def test_bad_arguments(options, says, argv, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit):
        bench_engine.main([*argv, *options])
    assert re.search(says, capsys.readouterr().err)


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
