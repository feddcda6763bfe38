"""What `auto` would choose in cells of pipeline.csv: made-up ones, and those that were measured."""

import pytest

from experiments.auto_rule import RATES, main, verdicts
from experiments.harness import RESULTS, append_row
from experiments.pipeline_figures import read_steps
from tests.test_pipeline_figures import STEPS, step

# issue 5: within 2 % of the better of the two in every cell. By the readings themselves the most is
# 0.7 %; readings scatter by 1 %, so that the rest is left for that
TARGET = 0.02
USUAL = {"qkv_stage": "attention", "o_stage": "ffn"}
H200 = {"gpu": "NVIDIA H200"} | USUAL


def split(batch: int, context: int, mode: str, ms: float, **more) -> dict[str, str]:
    attention, ffn = mode.split(":")
    sms = {"attention_sms": attention, "ffn_sms": ffn, "num_micro_batches": 2}
    return step(batch, context, mode, ms, **USUAL | sms | more)


def serial(batch: int, context: int, ms: float, **more) -> dict[str, str]:
    return step(batch, context, "serial", ms, **USUAL | more)


CELLS = [
    serial(1024, 512, 6.0),
    step(1024, 512, "plain", 4.0, **USUAL),  # no split: `auto` has none such
    split(1024, 512, "48:84", 5.0),
    split(1024, 512, "56:76", 5.5),
    split(1024, 512, "40:92", 4.0, num_micro_batches=3),
    split(1024, 512, "40:92", 4.0, qkv_stage="ffn"),
    serial(512, 512, 6.0),
    split(512, 512, "48:84", 5.98),
    serial(64, 512, 2.0),
    split(64, 512, "48:84", 3.0),
    serial(64, 128, 2.0),
]


def test_a_cell_is_pipelined_where_the_best_split_wins():
    """36 layers for 6, and what stands around them once."""
    found = {(v.batch, v.context): v for v in verdicts(CELLS)}
    assert found.keys() == {(1024, 512), (512, 512), (64, 512)}
    won, near, lost = (found[batch, 512] for batch in (1024, 512, 64))
    assert won.chosen == won.best_split == "48:84" and won.lost == 0
    assert won.speedup == pytest.approx((1 + 6 * 5) / (1 + 6 * 4))
    assert near.chosen == "serial" and near.lost == pytest.approx(near.speedup - 1)
    assert 0 < near.lost < 0.005
    assert lost.chosen == "serial" and lost.lost == 0 and lost.speedup < 1


def test_what_arithmetic_rules_out_counts_as_serial():
    """As `auto` has it where it knows the GPU's rates: it would not have timed the batch."""
    rows = [serial(64, 512, 2.0, **H200), split(64, 512, "48:84", 1.8, **H200)]
    assert H200["gpu"] in RATES
    (verdict,) = verdicts(rows)
    assert verdict.chosen == "serial" and verdict.lost == pytest.approx(7 / 5.8 - 1)
    rows = [row | {"batch": "1024"} for row in rows]
    assert verdicts(rows)[0].chosen == "48:84"


def test_which_splits_could_win_goes_by_the_contexts_that_auto_reads():
    """With 256 tokens, which the map has not, 52:80 has most to win; 128 are read for its sake."""
    of_4b = {"model": "Qwen3-4B", "num_layers": "36"} | H200
    for batch, chosen in ((1024, "52:80"), (64, "serial")):
        rows = [serial(batch, 128, 20.0, **of_4b), split(batch, 128, "52:80", 19.0, **of_4b)]
        assert verdicts(rows)[0].chosen == chosen


def test_the_command_prints_a_table(tmp_path, capsys):
    for row in CELLS:
        append_row(tmp_path / "pipeline.csv", row)
    main(["--csv", str(tmp_path / "pipeline.csv")])
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 and "best_split" in lines[0]
    assert last.startswith("3 cells, 1 pipelined; 0.4% lost at most")
    assert verdicts(STEPS) == [], "rows that do not say how they were cut"


def test_no_cell_that_was_measured_loses_more_than_was_aimed_for():
    """Whichever run of a cell counts."""
    rows = read_steps(RESULTS / "pipeline.csv")
    commits = {row["commit"] for row in rows}
    by_run = [verdicts(row for row in rows if row["commit"] == commit) for commit in commits]
    found = [*verdicts(rows), *(verdict for run in by_run for verdict in run)]
    assert len(found) > 300
    for one in found:
        assert one.lost <= TARGET, one
