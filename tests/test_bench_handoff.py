"""The hand-over benchmark: rows that hold what was copied and waited for, and aims beside them."""

import csv
import itertools
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.pd_core import PUSH_TOKENS
from experiments import bench_handoff, handoff_timing, shapes
from experiments.bench_handoff import HandoffReading, best_of
from tests.checkpoints import SIZES

READING = HandoffReading(
    model="m",
    tokens=1024,
    mode="push",
    way="kernel",
    bytes=100_000_000,
    copy_ms_p20=0.3,
    copy_ms_p50=0.5,
    copy_ms_p80=0.6,
    bulk_ms_p20=0.35,
    bulk_ms_p50=0.4,
    bulk_ms_p80=0.45,
    num_prompts=8,
    prefill_ms_p50=10.0,
    exposed_ms_p50=0.15,
    exposed_ms_p90=0.5,
)


@pytest.fixture
def argv(tmp_path, monkeypatch):
    sizes = {name: SIZES[name] for name in SIZES if name != "eos_token_id"}
    folder = shapes.write_config("Qwen3-0.6B", tmp_path / "tiny", **sizes)
    monkeypatch.setattr("engine.kv_cache.CPU_CACHE_BYTES", 1 << 21)
    return ["--model", str(folder), "--device", "cpu", "--out", str(tmp_path / "handoff.csv")]


def test_the_command_writes_a_row_for_each_way(argv, tmp_path, capsys):
    bench_handoff.main([*argv, "--tokens", "20", "300", "--prompts", "3"])
    rows = list(csv.DictReader((tmp_path / "handoff.csv").open()))
    assert [(row["tokens"], row["mode"], row["way"]) for row in rows] == [
        (tokens, mode, "kernel") for tokens in ("20", "300") for mode in ("slab", "push")
    ]
    block_bytes = 16 * 2 * 2 * 8 * 2 * 4  # tokens, k and v, heads, dims, layers, fp32
    for row in rows:
        assert [*row][: len(asdict(READING))] == [*asdict(READING)] and row["model"] == "tiny"
        assert int(row["bytes"]) == -(-int(row["tokens"]) // 16) * block_bytes
        assert 0 < float(row["copy_ms_p20"]) <= float(row["copy_ms_p50"])
        assert float(row["bulk_ms_p50"]) > 0 and float(row["prefill_ms_p50"]) > 0
        assert 0 <= float(row["exposed_ms_p50"]) <= float(row["exposed_ms_p90"])
        assert row["num_prompts"] == "3" and row["gpu"].startswith("cpu ")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("tiny, cpu") and len(printed) == 1 + 1 + 4 + 1
    assert re.match(r"soonest ready: 20: (slab|push), kernel; 300: ", printed[-1])


def test_what_was_read_before_a_failure_is_told(argv, tmp_path, monkeypatch, capsys):
    prompts, num_calls = handoff_timing.HandoffTimer.prompts, itertools.count()

    def fails_at_last(*args):
        if next(num_calls) == 1:
            raise RuntimeError("cudaMemcpyBatchAsync failed")
        return prompts(*args)

    monkeypatch.setattr(handoff_timing.HandoffTimer, "prompts", fails_at_last)
    with pytest.raises(RuntimeError, match="cudaMemcpyBatchAsync failed"):
        bench_handoff.main([*argv, "--tokens", "20", "--prompts", "2"])
    assert len((tmp_path / "handoff.csv").read_text().splitlines()) == 2
    assert "20: slab, kernel" in capsys.readouterr().out


@pytest.fixture
def timer(argv):
    core, kernels = bench_handoff._core(Path(argv[1]), "cpu", 100)
    yield handoff_timing.HandoffTimer(core, kernels)
    core.drain()
    core.assert_idle()


@pytest.mark.parametrize("mode", bench_handoff.MODES)
def test_prompts_go_the_way_that_is_timed(timer, mode, monkeypatch):
    sent = []
    [(slabs, pushes)] = timer._links.values()
    for name, link in (("slab", slabs), ("push", pushes)):
        monkeypatch.setattr(link, "open", recorded(link.open, name, sent))
    times = timer.prompts(40, mode, "kernel", 4)
    # 4 behind one that is not counted; a push has a copy for what earlier launches left too
    assert len([blocks for name, blocks in sent if name == mode and blocks == 3]) == 4
    assert {name for name, _ in sent} == {mode} and times.prefill_ms_p50 > 0


def test_a_prompts_prefill_is_its_own(timer, monkeypatch):
    """Not what all prompts so far took; and a prompt of whole blocks has no block more."""
    core, handoffs = timer._core, timer._core.handoffs
    busy, took = core.stats, iter([100.0, 5.0, 7.0, 6.0])

    def serve(num_tokens: int) -> None:
        busy.prefill_busy_ms += next(took)

    exposed = {"exposed_ms": {"p50": 1.0, "p90": 2.0}}
    queue = SimpleNamespace(stats=SimpleNamespace(as_dict=lambda: exposed))
    monkeypatch.setattr(timer, "_serve", serve)
    monkeypatch.setattr(handoff_timing, "HandoffQueue", lambda *_: queue)
    times = timer.prompts(64, "push", timer.ways[0], 3)
    core.handoffs = handoffs
    assert times == handoff_timing.PromptTimes(6.0, 1.0, 2.0)
    size = timer._source.block_size
    assert [timer.num_blocks(n * size + rest) for n, rest in ((4, 0), (4, 1), (0, 1))] == [4, 5, 1]


def recorded(open_copy, name, sent):
    def opened(source, target):
        sent.append((name, len(source)))
        return open_copy(source, target)

    return opened


def test_blocks_that_do_not_arrive_are_no_measurement(timer, monkeypatch):
    monkeypatch.setattr(handoff_timing.KVLink, "open", lambda self, *blocks: Nothing())
    with pytest.raises(AssertionError, match="blocks must arrive by slab and kernel"):
        timer.copies(40, "slab", "kernel")


class Nothing:
    def send(self, layers=None):
        pass


def test_aims_hold_or_are_named():
    assert READING.missed == ["share"]
    assert replace(READING, tokens=1023).missed == []  # for short prompts there is none
    assert replace(READING, copy_ms_p50=0.44).missed == []
    assert replace(READING, exposed_ms_p50=0.21).missed == ["share", "exposed"]
    cells = READING.cells()
    assert cells["GB/s"] == pytest.approx(200) and cells["bulk GB/s"] == pytest.approx(250)
    assert (cells["share"], cells["of prefill"]) == ("80%", "1.5%")
    assert (cells["handoff"], cells["aims"]) == ("push, kernel", "missed: share")


def test_what_is_soonest_ready_is_named_by_length():
    slow = replace(READING, mode="slab", prefill_ms_p50=9.5, exposed_ms_p50=0.7)
    fast = replace(slow, tokens=128, exposed_ms_p50=0.6)
    text = best_of([slow, READING, fast, replace(READING, tokens=128)])
    assert text.startswith("soonest ready: 1024: push, kernel; 128: slab, kernel (the engine's")
    assert f"from {PUSH_TOKENS['auto']} tokens on" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompts", "0"], "must be positive, got"),
        (["--device", "cuda"], "must have 2 GPUs, got 1"),
        (["--model", "nowhere"], "must be one of Qwen3-0.6B, .* or a folder, got 'nowhere'"),
    ],
)
def test_bad_arguments(options, says, argv, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit):
        bench_handoff.main([*argv, *options])
    assert re.search(says, capsys.readouterr().err)
