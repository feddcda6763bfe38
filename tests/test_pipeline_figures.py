"""Figures of the pipeline from made-up rows: losing cells are as plain as winning ones."""

import pytest

from experiments import plot
from experiments.bench_pipeline import Row as StepRow
from experiments.harness import append_row
from experiments.pipeline_figures import Cell, regime_maps, stage_lines
from experiments.stage_curves import Row as StageRow
from tests.test_plot import STAMP

GPU = STAMP["gpu"]


def row_of(kind, **values) -> dict[str, str]:
    row = dict.fromkeys(kind.__dataclass_fields__, "") | STAMP
    return row | {name: str(value) for name, value in values.items()}


def step(batch: int, context: int, mode: str, ms: float, **more) -> dict[str, str]:
    shape = {"model": "Qwen3-8B", "num_layers": 6, "ends_ms": 1.0, "ms_p50": ms} | more
    return row_of(StepRow, batch=batch, context=context, mode=mode, **shape)


def stage(name: str, sms: int, ms: float, beside_sms="", **more) -> dict[str, str]:
    shape = {"model": "Qwen3-8B", "batch": 512, "context": 512, "ms_p50": ms} | more
    return row_of(StageRow, stage=name, sms=sms, beside_sms=beside_sms, **shape)


STEPS = [
    step(1024, 512, "serial", 6.0),
    step(1024, 512, "in order", 5.0),  # as good as it may be, it is no pipeline
    step(1024, 512, "plain", 5.5),
    step(1024, 512, "48:84", 5.0),
    step(64, 512, "serial", 2.0),
    step(64, 512, "48:84", 3.0),
    step(64, 128, "serial", 2.0),
]
TWO_MODES = (("serial", 12.0), ("48:84", 11.0))
STAGES = [
    stage("attention", 64, 0.2),
    stage("attention", 32, 0.3),
    stage("ffn", 64, 0.5),
    stage("attention", 32, 0.4, beside_sms=100),
    stage("ffn", 100, 0.6, beside_sms=32),
]


def test_cells_are_of_the_whole_model():
    """36 layers for 6, and what stands around them once."""
    [(place, cells)] = regime_maps(STEPS).items()
    assert place == (GPU, "Qwen3-8B", 6)
    assert cells == {
        (1024, 512): Cell(pytest.approx((1 + 6 * 5) / (1 + 6 * 4)), "48:84"),
        (64, 512): Cell(pytest.approx((1 + 6 * 1) / (1 + 6 * 2)), "48:84"),
    }


def test_depths_stand_apart_and_few_layers_are_said_to_flatter_serial():
    """The pipeline fills and drains once, over however many layers."""
    whole = [step(64, 512, "serial", 12.0), step(64, 512, "48:84", 11.0)]
    rows = [*STEPS, *(row | {"num_layers": "36"} for row in whole)]
    maps = regime_maps(rows)
    assert maps[GPU, "Qwen3-8B", 36] == {(64, 512): Cell(pytest.approx(12 / 11), "48:84")}
    assert maps[GPU, "Qwen3-8B", 6] == regime_maps(STEPS)[GPU, "Qwen3-8B", 6]
    between = [rows[4], rows[-2], rows[5], rows[-1]]  # serial of 6, of 36, and splits of both
    assert regime_maps(between)[GPU, "Qwen3-8B", 6][64, 512].speedup == pytest.approx(7 / 13)


def test_the_deepest_map_is_drawn_that_has_half_the_cells():
    """What it has not is missing, and cells between those of the map are on none."""
    few = f"Qwen3-8B from 6 layers (up to 6% too low) on {GPU}"
    cells = [(64, 512), (1024, 512), (64, 128), (16, 128), (928, 832), (896, 512)]
    of_six = [step(*cell, mode, ms) for cell in cells[:4] for mode, ms in TWO_MODES]
    of_all = [step(*cell, mode, ms, num_layers=36) for cell in cells for mode, ms in TWO_MODES]
    for num_cells, title in ((1, few), (2, f"Qwen3-8B on {GPU}")):
        between = of_all[-4:]
        [place] = shown(plot.draw_maps([*of_six, *of_all[: 2 * num_cells], *between]))
        assert place[2].splitlines()[0] == title
    figure = plot.draw_maps(of_all)
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["16", "64", "1024"]
    assert "faster in 4 of 4 cells" in figure.axes[0].get_title(loc="left")
    aside = [
        row | {"commit": "aside"}
        for row in [*of_six[:2], *(row | {"gpu": "cpu", "mode": "serial"} for row in of_all[:1])]
    ]
    assert plot.draw_maps([*of_all, *aside]).get_suptitle() == figure.get_suptitle()
    assert plot.draw_maps(of_all[-4:]) is None
    other = [row | {"gpu": "NVIDIA H200"} for row in of_all]
    titles = {place[:2]: place[2] for place in shown(plot.draw_maps([*other, *of_six]))}
    assert titles.keys() == {(0, 0), (1, 0)}, "one column, however deep"


def test_the_newest_row_counts_and_gpus_stand_apart():
    newer = step(64, 512, "48:84", 1.5, date="2026-02-01 10:00")
    other = [row | {"gpu": "NVIDIA H200"} for row in STEPS]
    maps = regime_maps([newer, *STEPS, *other])
    assert maps[GPU, "Qwen3-8B", 6][64, 512].speedup == pytest.approx(7 / 4)
    assert maps["NVIDIA H200", "Qwen3-8B", 6][64, 512].speedup == pytest.approx(7 / 13)
    assert regime_maps(STEPS[-1:]) == {}


def test_a_mode_that_the_newest_commit_did_not_measure_is_none_of_its_cell():
    old = {"date": "2026-01-01 10:00", "commit": "old"}
    new = {"date": "2026-01-02 10:00", "commit": "new"}
    rows = [
        step(64, 512, "serial", 2.0) | old,
        step(64, 512, "40:92", 1.6) | old,
        step(64, 512, "serial", 2.0) | new,
        step(64, 512, "48:84", 3.0) | new,
    ]
    (cells,) = regime_maps(rows).values()
    assert cells[64, 512].mode == "48:84"


def test_another_cut_is_another_mode_of_the_same_cell():
    cuts = [
        step(64, 512, "48:84", 1.8, num_micro_batches=3, date="2026-02-01 10:00"),
        step(64, 512, "serial", 2.2, qkv_stage="ffn", date="2026-02-01 11:00"),
        step(64, 512, "48:84", 1.9, qkv_stage="ffn", date="2026-02-01 11:00"),
    ]
    best = regime_maps([*STEPS, *cuts])[GPU, "Qwen3-8B", 6][64, 512]
    assert best == Cell(pytest.approx(8.2 / 6.4), "48:84, qkv in ffn")
    best = regime_maps([*STEPS, *cuts[:2]])[GPU, "Qwen3-8B", 6][64, 512]
    assert best == Cell(pytest.approx(7 / 5.8), "48:84, in 3")


def test_a_serial_step_that_swings_counts_by_its_fast_readings():
    """By no more than they scatter when clocks are steady, by the median."""
    rows = [step(64, 512, "serial", 13.0, ms_p20=12.0, ms_p80=14.0), step(64, 512, "48:84", 11.0)]
    swings = regime_maps(rows)[GPU, "Qwen3-8B", 6][64, 512]
    assert swings.speedup == pytest.approx((1 + 6 * 11) / (1 + 6 * 10))
    for row, fast, slow in ((rows[0], "12.0", "13.2"), (rows[1], "9.0", "14.0")):
        row |= {"ms_p20": fast, "ms_p80": slow}
    assert regime_maps(rows)[GPU, "Qwen3-8B", 6][64, 512] == swings
    rows[0] |= {"ms_p20": "12.8", "ms_p80": "13.1"}
    steady = regime_maps(rows)[GPU, "Qwen3-8B", 6][64, 512]
    assert steady.speedup == pytest.approx((1 + 6 * 12) / (1 + 6 * 10))


def test_lines_of_the_stages():
    [lines] = stage_lines(STAGES).values()
    assert lines["attention", False] == [(32, 0.3), (64, 0.2)]
    assert lines["attention", True] == [(32, 0.4)]
    assert lines["ffn", True] == [(100, 0.6)]


def test_a_stage_s_line_is_of_one_commit():
    older = stage("attention", 48, 0.9) | {"commit": "older", "date": "2020-01-01 00:00"}
    [lines] = stage_lines([older, *STAGES]).values()
    assert lines["attention", False] == [(32, 0.3), (64, 0.2)]


def test_a_shape_that_stands_for_another_is_not_on_the_map():
    half = [row | {"model": "Qwen3-8B-half"} for row in STEPS]
    assert len(plot.draw_maps([*STEPS, *half]).axes) == len(plot.draw_maps(STEPS).axes)
    assert plot.draw_maps(half) is None


def test_the_command_draws_what_there_is(tmp_path, capsys):
    argv = ["--pipeline", "--csv", str(tmp_path / "kernels.csv"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="must hold one of pipeline"):
        plot.main(argv)
    for row in STEPS:
        append_row(tmp_path / "pipeline.csv", row)
    plot.main(argv)
    for row in STAGES:
        append_row(tmp_path / "pipeline_stages.csv", row)
    plot.main(argv)
    names = {f"pipeline_{name}.{kind}" for name in ("map", "stages") for kind in ("png", "svg")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    drawn = (tmp_path / "out" / "pipeline_map.svg").read_text()
    assert "1.24x" in drawn and "0.54x loses" in drawn and "not measured" not in drawn
    assert "faster in 1 of 2 cells" in drawn and "commit abc1234, 2026-01-01" in drawn
    curves = (tmp_path / "out" / "pipeline_stages.svg").read_text()
    assert "attention, beside the other" in curves and "ffn, alone" in curves
    capsys.readouterr()


def test_cells_in_between_are_said_to_be_missing(tmp_path):
    rows = [*STEPS, step(64, 128, "48:84", 2.5)]
    figure = plot.draw_maps(rows)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("not measured") == 1 and sum("loses" in text for text in texts) == 2
    assert plot.draw_maps(STEPS[-1:]) is None and plot.draw_stages([]) is None


def shown(figure) -> list[tuple[int, int, str]]:
    """(row, column, title) of the places that hold something."""
    places = [(ax.get_subplotspec(), ax) for ax in figure.axes if ax.axison]
    return [(p.rowspan.start, p.colspan.start, ax.get_title(loc="left")) for p, ax in places]


def test_maps_stand_by_gpu_and_model():
    """Two GPUs and three models, one of them on one GPU alone."""
    small = [row | {"model": "Qwen3-0.6B"} for row in STEPS]
    middle = [row | {"model": "Qwen3-4B"} for row in STEPS]
    other = [row | {"gpu": "NVIDIA H200"} for row in small + STEPS]
    figure = plot.draw_maps([*other, *small, *middle, *STEPS])
    assert len(figure.axes) == 6
    few = "from 6 layers (up to 6% too low)"
    assert [(row, column, title.split("\n")[0]) for row, column, title in shown(figure)] == [
        (0, 0, f"Qwen3-0.6B {few} on {GPU}"),
        (0, 1, f"Qwen3-4B {few} on {GPU}"),
        (0, 2, f"Qwen3-8B {few} on {GPU}"),
        (1, 0, f"Qwen3-0.6B {few} on NVIDIA H200"),
        (1, 2, f"Qwen3-8B {few} on NVIDIA H200"),
    ]
    empty = figure.axes[4]
    assert not empty.axison and not empty.texts and not empty.images


def test_a_cell_has_one_place_in_all_maps():
    """What one GPU alone has measured is seen to be missing from the other's map."""
    other = [row | {"gpu": "NVIDIA H200"} for row in STEPS if row["batch"] == "64"]
    more = [step(64, 128, "48:84", 2.5, gpu="NVIDIA H200")]
    first, second = plot.draw_maps([*STEPS, *other, *more]).axes
    for ax in (first, second):
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["128", "512"]
        assert [tick.get_text() for tick in ax.get_yticklabels()] == ["64", "1024"]
    texts = {text.get_position(): text.get_text() for text in second.texts}
    assert texts[0, 1] == texts[1, 1] == "not measured"
    assert texts[1, 0] == "0.54x loses\n48:84" and "loses" in texts[0, 0]
    assert "faster in 0 of 2 cells" in second.get_title(loc="left")


def test_curves_stand_by_gpu_and_cell_to_one_scale():
    other = [row | {"gpu": "NVIDIA H200"} for row in STAGES if row["sms"] == "64"]
    small = [row | {"gpu": "NVIDIA H200", "batch": "256"} for row in STAGES]
    figure = plot.draw_stages([*other, *small, *STAGES])
    assert shown(figure) == [
        (0, 1, f"Qwen3-8B, 512 requests x 512 tokens\n{GPU}"),
        (1, 0, "Qwen3-8B, 256 requests x 512 tokens\nNVIDIA H200"),
        (1, 1, "Qwen3-8B, 512 requests x 512 tokens\nNVIDIA H200"),
    ]
    above, below = figure.axes[1], figure.axes[3]
    assert above.get_ylim() == below.get_ylim() and above.get_xlim() == below.get_xlim()
    figure.draw_without_rendering()
    assert above.get_xticklabels() and below.get_xticklabels(), "those of the upper may be alone"
    assert {label.get_text() for label in above.get_yticklabels(which="both")} >= {"0.3", "0.5"}


def test_a_csv_of_other_columns_is_refused(tmp_path):
    (tmp_path / "pipeline.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="must have the columns"):
        plot.main(["--pipeline", "--csv", str(tmp_path / "kernels.csv")])
