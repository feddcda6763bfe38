"""What the curves of the stages run and count, where there is no GPU; and one on a GPU."""

import pytest
import torch

from engine.stage_schedule import STAGES, Placement
from experiments import stage_curves
from experiments.bench_pipeline import bench_decoder, random_cache
from experiments.harness import environment, read_rows
from experiments.shapes import QWEN3, SHAPES
from experiments.stage_curves import Layer, Row, main
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
