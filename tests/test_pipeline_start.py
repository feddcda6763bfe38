"""What starting costs, where there is no GPU: the serial starts, and a word on the others."""

from pathlib import Path

import pytest
import torch

from engine.auto_pipeline import NOT_TIMED, TIME_WAS_UP
from engine.decode import batch_buckets
from engine.pipeline import DecodePipeline
from engine.pipeline_choice import Choice
from engine.stage_streams import InOrder
from experiments import pipeline_start
from experiments.harness import environment, read_rows
from experiments.pipeline_start import Found, main
from experiments.shapes import QWEN3, SHAPES
from tests.checkpoints import save_random
from tests.decode_steps import decoder_of, row_by_row, worker_options
from tests.test_auto_pipeline import Machine, auto_of
from tests.test_bench_pipeline import TINY

SHAPE = ["model", "num_layers", "max_num_seqs", "num_kv_blocks"]


@pytest.fixture
def argv(monkeypatch, tmp_path) -> list[str]:
    monkeypatch.setitem(SHAPES, "tiny", QWEN3 | TINY)
    monkeypatch.setenv("GREENLANE_CACHE", "to be put back")
    options = ["--layers", "2", "--max-num-seqs", "4", "--device", "cpu"]
    return ["--model", "tiny", *options, "--out", str(tmp_path / "start.csv")]


def test_a_cpu_has_serial_starts_alone(argv, capsys):
    """In processes of their own, which know nothing of what a test has patched."""
    main([*argv, "--what", "serial", "cold", "splits", "--num-kv-blocks", "64"])
    (row,) = read_rows(Path(argv[-1]), [*SHAPE, *Found.__dataclass_fields__, *environment("cpu")])
    assert [row[name] for name in SHAPE] == ["tiny", "2", "4", "64"]
    assert row["what"] == "serial" and float(row["seconds"]) > 0 and row["num_graphs"] == "0"
    assert row["calibration_s"] == row["num_untimed"] == row["taken_mib"] == ""
    out, err = capsys.readouterr()
    assert "serial" in out.splitlines()[1]
    assert err.splitlines()[-2:] == [
        f"{what} left out: a CPU has no SMs to divide" for what in ("cold", "splits")
    ]


def test_a_start_that_fails_is_left_out(argv, capsys):
    argv[argv.index("--max-num-seqs") + 1] = "0"
    main([*argv, "--what", "serial"])
    assert "serial left out: max_num_seqs must be" in capsys.readouterr().err


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return decoder_of(save_random(tmp_path_factory.mktemp("m"), "llama"), row_by_row())


def test_what_auto_adds_to_a_start(decoder, tmp_path, capsys):
    with torch.inference_mode():
        pipeline = auto_of(decoder, Machine(), tmp_path)
        pipeline.statistics.why_none = "auto: nothing won"
        pipeline.calibration_s = 3.0
        choices = {12: "40:92 at 8-16 tokens", 8: f"serial; {TIME_WAS_UP}", 4: NOT_TIMED}
        pipeline.statistics.choices = choices
        pipeline.choices = {12: (Choice(8, 16, "40:92", 1.2),), 8: ()}
        found = pipeline_start._calibration("cold", pipeline)
    assert found == {"calibration_s": 3.0, "num_untimed": 2, "num_pipelined": 1}
    assert capsys.readouterr().err.splitlines() == [
        "cold: serial: auto: nothing won",
        *(f"cold: {batch} requests: {reason}" for batch, reason in sorted(choices.items())),
    ]


def test_captures_are_of_every_bucket(decoder, monkeypatch):
    """Each is counted once, with what it took."""
    split = InOrder()
    split.name = "48:84"
    with torch.inference_mode():
        options = worker_options(decoder, 0, 12)
        pipeline = DecodePipeline(**options, streams=[split], min_requests=1)
        captured, run = pipeline.graphs.captured, pipeline.graphs.run

        def capturing(key, step) -> None:
            run(key, step)
            captured[key] = None
            pipeline.graphs.capture_ms += 500.0

        monkeypatch.setattr(pipeline.graphs, "run", capturing)
        monkeypatch.setattr(pipeline_start, "_free_bytes", lambda _: (5 - 3 * bool(captured)) << 20)
        found = pipeline_start._captured(pipeline, "all serial", [None])
        assert (
            found.num_graphs == len(pipeline.buckets) and list(captured) == pipeline.buckets[::-1]
        )
        assert found.capture_s == 0.5 * found.num_graphs and found.taken_mib == 3.0
        found = pipeline_start._captured(pipeline, "all of 1 splits", [split])
        assert found.num_graphs == len(pipeline.sizes)
        assert {key[1] for key in captured if isinstance(key, tuple)} == set(pipeline.sizes)


@pytest.mark.gpu
def test_rows_of_a_gpu(tmp_path):
    out = tmp_path / "start.csv"
    shape = ["--model", "Qwen3-0.6B", "--layers", "2", "--max-num-seqs", "32"]
    shape += ["--num-kv-blocks", "1024"]  # another test may have the rest of the memory
    main([*shape, "--what", "serial", "cold", "splits", "--out", str(out)])
    rows = read_rows(out, [*SHAPE, *Found.__dataclass_fields__, *environment("cuda")])
    assert [row["what"] for row in rows] == ["serial", "cold", "all serial", "all of 5 splits"]
    assert all(int(row["num_graphs"]) > 0 for row in rows)
    assert rows[1]["num_untimed"] == rows[1]["num_pipelined"] == "0"  # none is worth a reading
    assert int(rows[3]["num_graphs"]) == 5 * len(batch_buckets(16))
