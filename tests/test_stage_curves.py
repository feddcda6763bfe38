"""What the curves of the stages run and count, where there is no GPU; and one on a GPU."""

from types import SimpleNamespace

import pytest
import torch

from engine.stage_schedule import STAGES, Placement
from experiments import stage_curves
from experiments.bench_pipeline import bench_decoder, random_cache
from experiments.harness import environment, read_rows
from experiments.shapes import QWEN3, SHAPES
from experiments.stage_curves import GRAPH_CALLS, Layer, Row, Stage, main
from tests.test_bench_pipeline import TINY

CELL = (3, 20)


@pytest.fixture
def layer(monkeypatch) -> Layer:
    monkeypatch.setitem(SHAPES, "tiny", QWEN3 | TINY)
    decoder = bench_decoder("tiny", 2, torch.device("cpu"), 32)
    return Layer(decoder, random_cache(decoder, 8), CELL, Placement())


class Runs:
    """In place of a graph: each layer once."""

    def __init__(self, run, num_layers, stream) -> None:
        for i in range(num_layers):
            run(i)


def test_each_stage_runs_its_operations_and_stores_nothing(layer, monkeypatch):
    monkeypatch.setattr(stage_curves, "Stage", Runs)
    used = []
    for name in ("project_qkv", "attend", "project_o", "mlp"):
        original = getattr(layer.decoder, name)

        def noting(i, *args, name=name, original=original, **options) -> None:
            used.append((i, name))
            original(i, *args, **options)

        monkeypatch.setattr(layer.decoder, name, noting)
    kept = layer.kv_cache.blocks.clone()
    with torch.inference_mode():
        for stage in STAGES:
            layer.stage(stage, None, None)
    assert torch.equal(layer.kv_cache.blocks, kept)
    attention, ffn = ("project_qkv", "attend"), ("project_o", "mlp")
    assert used == [(i, name) for part in (attention, ffn) for i in (0, 1) for name in part]


def test_counts_are_of_one_layer(layer):
    qkv, o, mlp = 32 * 8 * (4 + 2 * 2), 8 * 4 * 32, 3 * 32 * 48
    kv_bytes = 3 * 20 * 2 * 2 * 8 * 4
    assert layer.counts("attention") == {"bytes": 4 * qkv + kv_bytes, "flops": 2 * 3 * qkv}
    assert layer.counts("ffn") == {"bytes": 4 * (o + mlp), "flops": 2 * 3 * (o + mlp)}


class At:
    """An event that was recorded at a time, in milliseconds."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def elapsed_time(self, other: "At") -> float:
        return other.ms - self.ms


def stage_of(ms: float, replays: list[int], *, slowed: float = 1.0) -> Stage:
    """A Stage whose graph takes so long, beside another slowed; replays: the numbers asked for."""

    class Timed(Stage):
        def __init__(self) -> None:
            self.stream = SimpleNamespace(wait_event=lambda event: None)

        def replay(self, times: int) -> list[At]:
            replays.append(times)
            took = ms if len(replays) <= 2 else ms * slowed
            return [At(i * took) for i in range(times + 1)]

    return Timed()


def test_times_are_of_one_call_of_a_graph():
    ends = [0.0, 24.0, 72.0, 144.0]  # 1, 2 and 3 ms a call
    assert stage_curves._times([At(ms * GRAPH_CALLS / 24) for ms in ends]).p50 == 2.0


@pytest.mark.parametrize(("slowed", "is_measured"), [(1.4, True), (1000.0, False)])
def test_the_other_stage_runs_until_the_last_replay_is_over(monkeypatch, slowed, is_measured):
    """However much slower one is beside it; within reason."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    own, other = stage_of(48.0, [], slowed=slowed), stage_of(24.0, [])
    if not is_measured:
        with pytest.raises(ValueError, match="must run longer"):
            own.beside(other)
        return
    assert own.beside(other).p50 == pytest.approx(48.0 * slowed / GRAPH_CALLS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_there_is_nothing_to_measure():
    with pytest.raises(SystemExit, match="needs a GPU"):
        main([])


@pytest.mark.gpu
def test_rows_of_both_stages_alone_and_beside(tmp_path):
    out = tmp_path / "stages.csv"
    argv = ["--model", "Qwen3-0.6B", "--layers", "2", "--cells", "64x256", "--sms", "32", "64"]
    main([*argv, "--out", str(out)])
    rows = read_rows(out, [*Row.__dataclass_fields__, *environment("cuda")])
    alone = [(row["stage"], row["sms"]) for row in rows if not row["beside_sms"]]
    assert alone == [(stage, sms) for sms in ("32", "64") for stage in STAGES]
    beside = {(row["stage"], row["sms"], row["beside_sms"]) for row in rows if row["beside_sms"]}
    assert len(beside) == 4 and all(float(row["ms_p50"]) > 0 for row in rows)
