"""The benchmark of the pipeline, where there is no GPU: rows, counts and the cut's own bits."""

from types import SimpleNamespace

import pytest
import torch

from engine.device_rates import step_model
from engine.stage_schedule import Placement
from experiments import pipeline_cell, pipeline_map
from experiments.bench_pipeline import Row, _parse, main
from experiments.harness import environment, read_rows
from experiments.pipeline_cell import AT_ONCE, BEHIND_A_PAUSE, READING_MS, STEADY, Cell
from experiments.pipeline_map import fitting, most_telling_first
from experiments.shapes import QWEN3, SHAPES
from experiments.timing import Effort, Times
from models.config import ModelConfig
from tests.test_step_model import H200

TINY = {
    "vocab_size": 1009,
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}


@pytest.fixture
def rows(tmp_path, monkeypatch, capsys) -> list[dict[str, str]]:
    monkeypatch.setitem(SHAPES, "tiny", QWEN3 | TINY)
    monkeypatch.setattr(pipeline_cell, "STEPS_ON_HOST", 1)
    out = tmp_path / "pipeline.csv"
    options = ["--device", "cpu", "--layers", "2", "--timed", "--out", str(out)]
    main(["--model", "tiny", *options, "--cells", "6x20", "10x5"])
    assert "of_serial" in capsys.readouterr().out
    columns = [*Row.__dataclass_fields__, *environment("cpu")]
    return read_rows(out, columns)


def test_rows_of_a_machine_without_a_gpu(rows):
    """No streams there: the serial step, and the cut in order."""
    found = [(row["batch"], row["context"], row["mode"]) for row in rows]
    modes = ("serial", "in order")
    assert found == [(b, c, mode) for b, c in (("6", "20"), ("10", "5")) for mode in modes]
    for row in rows:
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
        assert float(row["ends_ms"]) > 0
        assert row["attention_sms"] == row["ffn_sms"] == row["overlap"] == ""
        assert row["num_layers"] == "2" and row["model"] == "tiny"
    in_order = [row for row in rows if row["mode"] == "in order"]
    assert all(row["same_logits"] == "True" for row in in_order)
    assert [row["same_tokens"] for row in in_order] == ["6", "10"]
    assert [row["num_micro_batches"] for row in rows] == ["1", "2"] * 2


def test_clocks_are_steady_before_the_first_mode_is_timed(tmp_path, monkeypatch):
    """Behind all captures, whose pauses unsettle them; and what a step does not write is not taken
    for its logits."""
    monkeypatch.setitem(SHAPES, "tiny", QWEN3 | TINY)
    seen, step = [], Cell.step

    def stepped(cell, mode) -> list[int]:
        seen.append(mode and mode.name)
        return [-1] * cell.batch if mode is None else step(cell, mode)

    def timed(cell, mode, effort=STEADY) -> Times:
        seen.append((mode and mode.name, effort))
        return Times(1.0, 1.0, 1.0)

    monkeypatch.setattr(Cell, "step", stepped)
    monkeypatch.setattr(Cell, "time", timed)
    out = tmp_path / "pipeline.csv"
    options = ["--device", "cpu", "--layers", "1", "--out", str(out)]
    main(["--model", "tiny", *options, "--cells", "6x20"])
    assert seen == [
        *[("ends", AT_ONCE), "in order", None, "in order"],
        *[(None, BEHIND_A_PAUSE), (None, STEADY), ("in order", STEADY)],
    ]
    found = read_rows(out, [*Row.__dataclass_fields__, *environment("cpu")])
    same = [(row["same_tokens"], row["same_logits"]) for row in found]
    assert same == [("0", "False"), ("6", "True")]


def test_counts_are_of_all_layers(rows):
    num_weights = 2 * (32 * 8 * (4 + 2 * 2) + 8 * 4 * 32 + 3 * 32 * 48)
    assert int(rows[0]["layer_bytes"]) == 4 * num_weights
    assert int(rows[0]["layer_flops"]) == 2 * 6 * num_weights
    assert int(rows[0]["kv_bytes"]) == 2 * 2 * 6 * 20 * 2 * 8 * 4
    assert int(rows[0]["head_bytes"]) == 1009 * 32 * 4


@pytest.mark.parametrize("step_ms, replays", [(READING_MS / 3, 3), (3 * READING_MS, 1)])
def test_what_a_step_has_captured_is_replayed_as_often_as_a_reading_holds(
    monkeypatch, step_ms, replays
):
    """Once its inputs lie where it looks for them."""
    done, timed = [], []

    class Captured(Cell):
        """One that captures, and has nothing to run."""

        def __init__(self) -> None:
            self._graphs = {}
            self.pipeline = SimpleNamespace(
                device=torch.device("cuda"), schedule=(SimpleNamespace(stream="ffn"),), streams={}
            )

        def step(self, mode) -> list[int]:
            done.append("step")
            self._graphs[mode] = SimpleNamespace(replay=lambda: done.append("replay"))
            return []

    def time_calls(run, steps, device, effort, *, captured) -> Times:
        assert not captured
        run(0)
        timed.append((steps, effort))
        return Times(step_ms, step_ms, step_ms)

    monkeypatch.setattr(pipeline_cell, "time_calls", time_calls)
    cell = Captured()
    assert cell.time(None).p50 == step_ms
    assert done == ["step", "replay", "replay"]
    assert timed == [(1, Effort(min_replays=2)), (replays, STEADY)]
    cell.ends()
    assert timed[-1] == (replays, AT_ONCE) and len(cell.pipeline.schedule) == 1


def test_a_map_goes_on_where_it_was_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", QWEN3 | TINY)
    monkeypatch.setattr(pipeline_cell, "STEPS_ON_HOST", 1)
    monkeypatch.setattr(pipeline_map, "MAP_BATCHES", (4, 2))
    monkeypatch.setattr(pipeline_map, "MAP_CONTEXTS", (5,))
    monkeypatch.setenv("GREENLANE_COMMIT", "abc1234")
    out = tmp_path / "pipeline.csv"
    argv = ["--model", "tiny", "--device", "cpu", "--layers", "2", "--map", "--out", str(out)]
    main([*argv, "--max-seconds", "0"])
    assert "out of time, left out: 4x5 2x5" in capsys.readouterr().err
    assert not out.exists()
    for _ in range(2):
        main(argv)
    columns = [*Row.__dataclass_fields__, *environment("cpu")]
    assert [row["batch"] for row in read_rows(out, columns)] == ["4", "4", "2", "2"]
    monkeypatch.setenv("GREENLANE_COMMIT", "def5678")
    main([*argv, "--num", "2"])
    assert len(read_rows(out, columns)) == 8


def test_a_map_begins_where_there_is_most_to_win():
    args = _parse(["--map", "--model", "Qwen3-8B"])
    assert args.layers == 36
    model = step_model(ModelConfig.from_dict(SHAPES["Qwen3-8B"]), 2, H200, 2, Placement())
    cells = most_telling_first(args.cells, args.splits, model)
    assert len(cells) == len(set(cells)) == 28
    assert {(512, 512), (1024, 512)} < set(cells[:3]) and cells[-1] == (4, 128)
    assert most_telling_first(args.cells, args.splits, None) == args.cells


def test_cells_that_do_not_fit_are_left_out(monkeypatch, capsys):
    config = ModelConfig.from_dict(SHAPES["Qwen3-8B"] | {"num_hidden_layers": 6})
    embedding = torch.empty(0, dtype=torch.bfloat16)
    decoder = SimpleNamespace(config=config, weights=SimpleNamespace(embedding=embedding))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70 << 30, 80 << 30))
    kept, num_blocks = fitting([(1024, 4096), (512, 4096)], decoder, torch.device("cuda"))
    assert kept == [(512, 4096)] and num_blocks == 512 * 256
    assert "out of memory, left out: 1024x4096" in capsys.readouterr().err
