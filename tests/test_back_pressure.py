"""A burst into few decode blocks: counts of a bounded and an unbounded engine, and their rows."""

import pytest

from experiments import workloads
from experiments.back_pressure import Pressure, main
from experiments.harness import environment, read_as, read_rows
from experiments.shapes import SHAPES

SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 100,
}


@pytest.fixture
def rows(tmp_path, monkeypatch) -> list[Pressure]:
    monkeypatch.setattr(workloads, "MAX_TOKEN_ID", 99)
    monkeypatch.setitem(SHAPES, "Qwen3-0.6B", SHAPES["Qwen3-0.6B"] | SMALL)
    out = tmp_path / "back_pressure.csv"
    sizes = {"requests": 16, "prompt": 16, "output": 48, "held": 4, "backlog": 2}
    argv = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    main(["--device", "cpu", "--out", str(out), *argv])
    columns = [*Pressure.__dataclass_fields__, *environment("cpu")]
    return [read_as(Pressure, row) for row in read_rows(out, columns)]


def test_bound_and_promise_keep_prompts_from_being_computed_twice(rows):
    bounded, free = rows
    assert (bounded.config, free.config) == ("bounded", "unbounded")
    assert bounded.num_kv_blocks == free.num_kv_blocks == 16
    assert bounded.peak_backlog == 2 == bounded.max_decode_backlog
    assert (bounded.num_preemptions, bounded.computed) == (0, 1.0)
    assert free.peak_backlog > 2 and free.num_preemptions > 0 and free.computed > 1
