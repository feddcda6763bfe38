"""Targets: the right readings are found, and a figure is judged the right way round."""

from dataclasses import asdict, replace

import pytest

from experiments.bench_kernels import all_cases
from experiments.engine_csv import read_engine_csv
from experiments.harness import RESULTS, append_row
from experiments.readings import BANDWIDTH, Reading
from experiments.sheet import Sheet, sm_curves
from experiments.target import EngineFigure, EngineTarget, Target, ours
from experiments.targets import ENGINE, main, targets
from experiments.targets_page import Line, engine_lines
from tests.test_engine_csv import READING

RUN = {"gpu": "H100", "date": "2026-01-02", "commit": "abc"}


def reading(kernel: str, impl: str, ms: float, **fields: object) -> Reading:
    common = {"shape": "B=1 x", "dtype": "bfloat16", "partitioning": "none"}
    common |= {"sms_asked": None, "sms_granted": 132}
    times = dict.fromkeys(("ms_p20", "ms_p50", "ms_p80"), ms)
    sizes = {"bytes": 10**9, "flops": 0}
    return Reading(kernel=kernel, impl=impl, **common | times | sizes | RUN | fields)


CEILINGS = [
    reading("ceiling", "read stream", 0.5),
    reading("ceiling", "copy", 0.8),
    reading("ceiling", "matmul", 1.0, flops=10**12),
]


def sheet(*readings: Reading) -> Sheet:
    return Sheet.of([*CEILINGS, *readings], "H100")


GRID = {"partitioning": "grid", "sms_asked": 56}
GREEN = {"partitioning": "green", "sms_asked": 56, "sms_granted": 56}


def test_figures():
    """1 GB at 1 ms; the stream reads it in half of that."""
    ours = reading("decode_attention", "ours", 1.0)
    found = sheet(
        ours,
        reading("decode_attention", "slow", 3.0),
        reading("decode_attention", "fast", 0.9),
        reading("decode_attention", "fast", 1.8, **GREEN),
        replace(ours, **GRID, ms_p50=1.25),
        replace(ours, **GREEN, ms_p50=1.5),
        replace(ours, shape="B=2 y", ms_p50=0.8),
    )
    aim = Target(kernel="decode_attention", shape="B=1", measure="share", want=50)
    figures = {"share": 50.0, "peer": 0.9, "reads": 2.0, "rate": 0.0}
    for measure, figure in figures.items():
        assert replace(aim, measure=measure).figure(found) == pytest.approx(figure)
    assert replace(aim, measure="peer", beside="slow").figure(found) == pytest.approx(3.0)
    assert replace(aim, measure="peer", beside="none").figure(found) is None
    on_grid = replace(aim, measure="whole", num_sms=56, partitioning="grid")
    assert on_grid.figure(found) == pytest.approx(80)
    on_green = replace(on_grid, partitioning="green")
    assert on_green.figure(found) == pytest.approx(100 / 1.5)
    assert replace(on_green, measure="peer").figure(found) == pytest.approx(1.2)
    assert replace(on_grid, measure="peer").figure(found) is None
    assert replace(aim, measure="even", beside="B=2").figure(found) == pytest.approx(0.8)
    assert replace(aim, shape="B=3").figure(found) is None
    assert replace(aim, measure="even", beside="B=3").figure(found) is None
    assert replace(aim, measure="peer").figure(sheet(ours)) is None


def test_a_published_time_is_scaled_by_what_the_machines_read():
    """The stream reads 2000 GB/s here, 3163 there."""
    options = {"measure": "published", "want": 1.0, "published_us": 500.0}
    aim = Target(kernel="decode_attention", shape="B=1", **options)
    figure = aim.figure(sheet(reading("decode_attention", "ours", 1.0)))
    assert figure == pytest.approx(0.5 * 3163 / 2000)


def test_a_shape_is_found_by_its_first_words_the_shortest_first():
    found = sheet(
        reading("sample", "ours", 4.0, shape="B=2 top_k=50"),
        reading("sample", "ours", 1.0, shape="B=2"),
        reading("sample", "ours", 3.0, shape="B=22"),
    )
    aim = Target(kernel="sample", shape="B=2", measure="reads", want=1.5)
    assert aim.figure(found) == pytest.approx(2.0)
    assert replace(aim, shape="B=2 top_k=50").figure(found) == pytest.approx(8.0)
    assert replace(aim, shape="B").figure(found) is None
    without = [r for r in found.readings if r.shape != "B=2"]
    assert aim.figure(sheet(*without)) is None  # another limit's time is not this one's
    others = [replace(r, kernel="mlp") for r in without]
    assert replace(aim, kernel="mlp").figure(sheet(*others)) == pytest.approx(8.0)


@pytest.mark.parametrize(
    "measure, figure, holds",
    [("share", 49, False), ("share", 50, True), ("reads", 51, False), ("reads", 50, True)],
)
def test_costs_are_bounded_from_above_and_all_else_from_below(measure, figure, holds):
    assert Target(kernel="sample", shape="", measure=measure, want=50).holds(figure) == holds


def test_the_peers_and_ceilings_of_the_same_run_count():
    old = [replace(r, date="2026-01-01", ms_p50=r.ms_p50 / 2) for r in CEILINGS]
    ours = reading("decode_attention", "ours", 1.0)
    stale = reading("decode_attention", "peer", 0.1, date="2026-01-01")
    found = Sheet.of([*old, stale, *CEILINGS, ours], "H100")
    aim = Target(kernel="decode_attention", shape="B=1", measure="share", want=50)
    assert aim.figure(found) == pytest.approx(50)
    assert replace(aim, measure="peer").figure(found) is None


def test_partitions_and_shapes_of_another_run_are_not_compared():
    """A later run that reads fewer of them, on a slower machine, would make the others faster."""
    mine = reading("decode_attention", "ours", 1.0)
    part, even = replace(mine, **GRID, ms_p50=1.25), replace(mine, shape="B=2 y")
    later = {"date": "2026-02-01", "commit": "def"}
    whole = Target(kernel="decode_attention", shape="B=1", measure="whole", want=1, num_sms=56)
    whole = replace(whole, partitioning="grid")
    beside = replace(whole, measure="even", beside="B=2", num_sms=None, partitioning="none")
    rerun = [replace(r, **later) for r in (*CEILINGS, replace(mine, ms_p50=2.0))]
    found = sheet(mine, part, even, *rerun)
    assert whole.figure(found) is None and beside.figure(found) is None
    assert not sm_curves(found)
    found = sheet(mine, part, even)
    assert whole.figure(found) == pytest.approx(80) and beside.figure(found) == pytest.approx(1)
    assert sm_curves(found)


def test_of_two_numbers_of_sms_granted_the_newest_counts():
    old = reading("mlp", "ours", 1.0, **GREEN)
    new = replace(old, sms_granted=64, ms_p50=2.0, date="2026-02-01")
    ceilings = [replace(r, date="2026-02-01") for r in CEILINGS]
    found = sheet(old, new, *ceilings)
    assert ours(found, "mlp", "B=1", 56, "green") == new


def test_a_run_that_was_cut_off_among_its_ceilings_is_left_out():
    lone = replace(CEILINGS[0], date="2026-02-01", ms_p50=0.1)
    found = sheet(reading("mlp", "ours", 1.0), lone)
    assert found.roof.gb_s["read stream"] == pytest.approx(2000)
    with pytest.raises(ValueError, match="got ceilings alone"):
        Sheet.of([lone], "H100")


def test_the_committed_page_follows_from_the_committed_readings(tmp_path):
    main(["--out", str(tmp_path / "kernels.md")])
    committed = (RESULTS / "kernels.md").read_text()
    assert (tmp_path / "kernels.md").read_text() == committed


def test_what_lacks_the_whole_gpu_says_so():
    aim = Target(kernel="mlp", shape="B=1", measure="whole", want=1, num_sms=56)
    aim = replace(aim, partitioning="green")
    found = sheet(reading("mlp", "ours", 1.0, **GREEN))
    assert aim.figure(found) is None and aim.lacking(found) == "mlp beside the whole GPU"
    aim = Target(kernel="mlp", shape="B=1", measure="peer", want=1)
    assert aim.lacking(sheet(reading("mlp", "ours", 1.0))) == "mlp beside the best peer"


def test_the_engine_is_judged_by_the_median_of_its_newest_run():
    one = replace(READING, model="m", workload="w", config="one", eager=False, date="2026-01-02")
    rows = [
        replace(one, output_tok_s=9000, date="2026-01-01"),
        replace(one, output_tok_s=100),
        replace(one, output_tok_s=300),
        replace(one, output_tok_s=7, date="2026-01-03", eager=True),
        replace(one, output_tok_s=8, date="2026-01-03", gpu="H200"),
        replace(one, output_tok_s=900, date="2026-01-03", config="pd"),  # of two GPUs
    ]
    aim = EngineTarget("m", "w", 150, 120)
    assert aim.figure(rows, "H100") == EngineFigure(200, "abc")
    assert aim.figure(rows, "B200") is None
    (line,) = engine_lines("H100", [aim], rows)
    bound = "at least 150 tokens/s (vLLM on an H100: 120)"
    made = {"measured": "200 tokens/s", "holds": True, "commit": "abc"}
    assert line == Line(kernel="engine", where="m w", bound=bound, **made)
    assert not engine_lines("H100", [replace(aim, want=201)], rows)[0].holds


def test_the_engine_targets_are_found_among_the_committed_readings():
    rows = read_engine_csv(RESULTS / "engine.csv")
    gpu = "NVIDIA H100 80GB HBM3"
    assert len(ENGINE) == 6 and all(aim.figure(rows, gpu) for aim in ENGINE)


def test_every_target_names_a_case_of_the_benchmark():
    for aim in targets():
        assert aim.kernel in BANDWIDTH
        cases = [c for c in all_cases() if c.kernel == aim.kernel]
        beside = aim.beside if aim.measure == "even" else ""
        for shape in filter(None, (aim.shape, beside)):
            assert any(f"{c.shape} ".startswith(f"{shape} ") for c in cases), shape
        if aim.num_sms is not None:
            swept = [c for c in cases if f"{c.shape} ".startswith(f"{aim.shape} ")]
            assert all(aim.num_sms in c.sweep for c in swept)
            assert aim.measure == "whole" or all(c.sweeps_peers for c in swept)


def test_every_kernel_with_a_figure_to_reach_has_a_target():
    counts = {kernel: sum(aim.kernel == kernel for aim in targets()) for kernel in BANDWIDTH}
    without = {kernel for kernel, count in counts.items() if not count}
    assert without == {"linear", "rms_norm"}, "parts of what has one"
    on_green = [a for a in targets() if a.kernel == "mlp" and a.partitioning == "green"]
    assert {(a.num_sms, a.shape.split("M=")[1]) for a in on_green} == {
        (n, str(M)) for n in (64, 96) for M in (128, 256, 512, 1024)
    }


def test_the_page_is_written(tmp_path):
    path, out = tmp_path / "kernels.csv", tmp_path / "kernels.md"
    for r in [*CEILINGS, reading("sample", "ours", 1.0, shape="B=256 V=151936 greedy")]:
        append_row(path, asdict(r))
    main(["--csv", str(path), "--engine-csv", str(tmp_path / "none"), "--out", str(out)])
    assert "| sample | B=256 V=151936 greedy | at most 1.50 reads of the logits | 2.00" in (
        out.read_text()
    )
