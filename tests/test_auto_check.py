"""What decode_pipeline="auto" chose, held against longer readings: over stand-in times, where there
is no GPU."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.pipeline_stats import SERIAL
from engine.trial_steps import LONG, Reading
from experiments import auto_check
from experiments.auto_check import SHAPE, Checked, cells, checked, lines, main
from experiments.harness import environment, read_rows
from experiments.shapes import QWEN3, SHAPES
from tests.checkpoints import save_random
from tests.decode_steps import decoder_of, row_by_row
from tests.test_auto_pipeline import SPLITS, Machine, auto_of
from tests.test_bench_pipeline import TINY

COLUMNS = [*SHAPE, *Checked.__dataclass_fields__]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return decoder_of(save_random(tmp_path_factory.mktemp("m"), "llama"), row_by_row())


def test_a_choice_that_longer_readings_do_not_bear_out(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (16,))
    lucky = Machine({"56:76": 1.2, "40:92": 1.1})
    with torch.inference_mode():
        pipeline = auto_of(decoder, lucky, tmp_path)
        pipeline.warm_up()
        choices = dict(pipeline.choices)
        steady = Machine({"56:76": 0.8, "40:92": 1.25})
        pipeline._time_step = steady.step_ms
        all_cells = cells(pipeline)
        assert {(12, 16), (4, 64)} <= set(all_cells)
        pipeline.readings[12][10**6] = {SERIAL: 1.0, "56:76": 1.0}  # of a larger pool
        pipeline.readings[8][32] = {SERIAL: 1.0}  # no split could be had
        assert cells(pipeline) == all_cells
        num_tokens = pipeline.kv_cache.num_blocks * pipeline.kv_cache.block_size
        even = {SERIAL: 1.0, "56:76": 1.0}
        pipeline.readings[1] = {num_tokens: even, num_tokens + 1: even}
        assert {*cells(pipeline)} - {*all_cells} == {(1, num_tokens)}
        rows = checked(pipeline, 12, 16, LONG)
        assert pipeline.choices == choices
    assert {row.mode: (row.auto_ms, row.ms) for row in rows} == {
        SERIAL: (10.0, 10.0),
        "40:92": (10 / 1.1, 8.0),
        "56:76": (10 / 1.2, 12.5),
        "72:60": (10.0, 10.0),
    }
    assert [row.mode for row in rows if row.is_chosen] == ["56:76"]
    assert {asked[:2] for asked in steady.asked} == {(12, 16)} and set(steady.how) == {LONG}
    (line,) = lines(rows)
    assert (line["best_split"], line["chosen"], line["serial_ms"]) == ("40:92", "56:76", 10.0)
    assert line["speedup"] == pytest.approx(1.25) and line["auto_read"] == pytest.approx(1.1)
    assert line["lost"] == pytest.approx(12.5 / 8 - 1)


def test_a_split_that_is_gone_is_left_out(decoder, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (16,))
    with torch.inference_mode():
        auto_of(decoder, Machine({"56:76": 1.2}), tmp_path).warm_up()
        pipeline = auto_of(decoder, Machine(fails=frozenset({"40:92"})), tmp_path)
        pipeline.warm_up()
        steady = Machine()
        pipeline._time_step = steady.step_ms
        rows = checked(pipeline, 12, 16, LONG)
    names = {":".join(map(str, split)) for split in SPLITS}
    assert {row.mode for row in rows} == {SERIAL, *names - {"40:92"}}
    assert lines([rows[0]]) == []  # no split to compare with


class FakeLLM:
    """One that has started with decode_pipeline="auto"."""

    def __init__(self, runner, **options) -> None:
        self.decode_runner = runner

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass


def test_the_closest_calls_come_first_until_time_is_up(decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("engine.pipeline_choice.CONTEXTS", (16,))
    with torch.inference_mode():
        pipeline = auto_of(decoder, Machine({"56:76": 1.2}), tmp_path)
        pipeline.warm_up()
    lost = dict.fromkeys(pipeline.readings[8][16].keys() - {SERIAL}, 10 / 0.93)
    pipeline.readings[8][16] |= lost  # by 7 %, no less
    pipeline.readings[4][64]["56:76"] = 10 / 1.05
    far = pipeline.readings[12][16]
    far |= dict.fromkeys(far.keys() - {SERIAL}, 10 / 0.7)  # nor one that is far behind
    steady = pipeline._time_step.__self__
    steady.how.clear()
    now = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(now)))
    monkeypatch.setattr(auto_check, "time", clock)
    monkeypatch.setattr(auto_check, "LLM", FakeLLM)
    written: list[Checked] = []
    how = {"reading_ms": 7.0, "write": written.append}
    rows = auto_check.check("check", pipeline, {}, max_seconds=2.5, **how)
    assert written == rows
    cells_read = list(dict.fromkeys((row.batch, row.context) for row in rows))
    assert cells_read == [(4, 64), (8, 16)]
    assert set(steady.how) == {Reading(1000.0, 7.0)}
    assert "check: out of time at 4 x 16" in capsys.readouterr().err
    pipeline.readings.clear()
    assert auto_check.check("check", pipeline, {}, max_seconds=9.0, **how) == []
    assert "check: nothing to check: nothing was timed" in capsys.readouterr().err


def test_rows_and_a_table(monkeypatch, tmp_path, capsys):
    rows = [
        Checked(batch=64, context=16, mode=mode, auto_ms=2.0, ms=ms, is_chosen=mode == SERIAL)
        for mode, ms in ((SERIAL, 2.1), ("48:84", 2.0))
    ]
    started = []

    def in_a_process(work, what, folder, options):
        assert (options["decode_pipeline"], options["num_kv_blocks"]) == ("auto", 80)
        started.append(what)
        if what != auto_check.WHAT:
            return []
        for row in rows:
            work.keywords["write"](row)
        return rows

    monkeypatch.setattr(auto_check, "in_a_process", in_a_process)
    monkeypatch.setenv("GREENLANE_CACHE", "to be put back")
    out = tmp_path / "check.csv"
    sizes = ["--max-num-seqs", "64", "--num-kv-blocks", "80"]
    main(["--layers", "2", "--starts", "2", "--device", "cpu", "--out", str(out), *sizes])
    assert started == ["start 1", "check"]
    read = read_rows(out, [*COLUMNS, *environment("cpu")])
    assert [read[0][name] for name in SHAPE] == ["Qwen3-8B", "2", "1000.0", "64", "80"]
    assert [(row["mode"], row["ms"], row["is_chosen"]) for row in read] == [
        (SERIAL, "2.1", "True"),
        ("48:84", "2.0", "False"),
    ]
    assert "lost at most: 5.0%, 64 x 16" in capsys.readouterr().out


def test_what_is_lost_is_against_the_fastest_of_all_modes():
    """Serial, where that is."""
    row = {"batch": 64, "context": 16, "auto_ms": 2.0}
    times = {SERIAL: 2.0, "48:84": 2.1, "56:76": 2.2}
    for chosen, lost in ((SERIAL, 0.0), ("48:84", 2.1 / 2.0 - 1)):
        rows = [Checked(**row, mode=m, ms=ms, is_chosen=m == chosen) for m, ms in times.items()]
        (line,) = lines(rows)
        assert (line["best_split"], line["chosen"], line["lost"]) == ("48:84", chosen, lost)


def test_a_cpu_has_nothing_to_check(monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(SHAPES, "tiny", QWEN3 | TINY)
    monkeypatch.setenv("GREENLANE_CACHE", "to be put back")
    out = tmp_path / "check.csv"
    small = ["--layers", "2", "--max-num-seqs", "4", "--starts", "1", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        # a process of its own knows nothing of SHAPES as it is here, and needs none of it
        patch.setattr(auto_check, "in_a_process", lambda work, *arguments: work(*arguments))
        main(["--model", "tiny", *small, "--out", str(out)])
    assert "check: nothing to check: serial: " in capfd.readouterr().err
    assert not Path(out).exists()


@pytest.mark.gpu
def test_rows_of_a_gpu(tmp_path, capsys):
    """Large enough that something is worth a reading."""
    out = tmp_path / "check.csv"
    small = ["--layers", "2", "--max-num-seqs", "512", "--num-kv-blocks", "16384"]
    small += ["--starts", "1", "--reading-ms", "5"]
    main(["--model", "Qwen3-8B", *small, "--max-seconds", "60", "--out", str(out)])
    rows = read_rows(out, [*COLUMNS, *environment("cuda")])
    assert {row["batch"] for row in rows} and {row["mode"] for row in rows} > {SERIAL}
    assert all(float(row["ms"]) > 0 for row in rows)
    assert "lost at most: " in capsys.readouterr().out
