"""The benchmark of the pipeline, where there is no GPU: rows, counts and the cut's own bits."""

import pytest

from experiments import pipeline_cell
from experiments.bench_pipeline import Row, main
from experiments.harness import environment, read_rows
from experiments.shapes import QWEN3, SHAPES

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
    monkeypatch.setattr(pipeline_cell, "REPLAYS", 1)
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


def test_counts_are_of_all_layers(rows):
    num_weights = 2 * (32 * 8 * (4 + 2 * 2) + 8 * 4 * 32 + 3 * 32 * 48)
    assert int(rows[0]["layer_bytes"]) == 4 * num_weights
    assert int(rows[0]["layer_flops"]) == 2 * 6 * num_weights
    assert int(rows[0]["kv_bytes"]) == 2 * 2 * 6 * 20 * 2 * 8 * 4
    assert int(rows[0]["head_bytes"]) == 1009 * 32 * 4
