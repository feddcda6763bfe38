"""The figures of kernels.csv: the numbers they show, the files they make, what they refuse."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from experiments import plot, sheet
from experiments.harness import append_row
from experiments.readings import COLUMNS, Reading, newest, read_csv
from experiments.sheet import Sheet, percent_bars, roofline_points, sm_curves

STAMP = {
    "date": "2026-01-01 10:00",
    "gpu": "NVIDIA H100 80GB HBM3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "driver": "580",
    "commit": "abc1234",
}


GRID = {"partitioning": "grid", "sms_asked": 66}
GREEN = {"partitioning": "green", "sms_asked": 60, "sms_granted": 64}


def reading(kernel: str, impl: str, ms: float, num_bytes: int, flops: int = 0, **other) -> Reading:
    row = {"shape": "s", "dtype": "bfloat16", "partitioning": "none"}
    row |= {"sms_asked": None, "sms_granted": 132} | STAMP | other
    times = {"ms_p20": ms, "ms_p50": ms, "ms_p80": ms}
    return Reading(kernel=kernel, impl=impl, bytes=num_bytes, flops=flops, **times, **row)


def run(**stamp: str) -> list[Reading]:
    """Ceilings of 3000 and 2500 GB/s and 750 TFLOP/s; three kernels, one of them on a grid of 66
    SMs too, one on a green context of 64."""
    gb, tf = 10**9, 10**12
    rows = [
        reading("ceiling", "read stream", 1.0, 3 * gb),
        reading("ceiling", "read stream", 2.0, 3 * gb, **GRID | {"sms_granted": 66}),
        reading("ceiling", "copy", 2.0, 5 * gb),
        reading("ceiling", "matmul", 2.0, gb, 1500 * 10**9),
        reading("decode_attention", "ours", 0.5, gb, 2 * gb, shape="B=64 context=4096"),
        reading("decode_attention", "ours", 0.625, gb, 2 * gb, shape="B=64 context=4096", **GRID),
        reading("decode_attention", "cudnn", 0.4, gb, 2 * gb, shape="B=64 context=4096"),
        reading("mlp", "ours", 2.0, gb, tf, shape="M=8192"),
        reading("mlp", "cublas chain", 2.5, gb, tf, shape="M=8192"),
        reading("mlp", "ours", 4.0, gb, tf, shape="M=8192", **GREEN),
        reading("mlp", "cublas chain", 5.0, gb, tf, shape="M=8192", **GREEN),
        reading("rms_norm", "ours", 0.5, gb, shape="T=1 & <N>"),
    ]
    return [replace(r, **stamp) for r in rows]


def write(path: Path, rows: list[Reading]) -> Path:
    for row in rows:
        append_row(path, asdict(row))
    return path


def test_a_row_comes_back_as_it_was_written(tmp_path):
    assert read_csv(write(tmp_path / "k.csv", run())) == run()


def test_rates_follow_from_the_counts():
    r = reading("mlp", "ours", 0.5, 10**9, 10**12)
    assert (r.gb_s, r.tflop_s) == (pytest.approx(2000), pytest.approx(2000))


def test_bars_are_percent_of_what_binds():
    bars = percent_bars(Sheet.of(run()))
    assert list(bars) == ["decode_attention", "mlp", "rms_norm"]
    decode = bars["decode_attention"]["B=64 context=4096"]
    assert list(decode) == ["ours", "cudnn"], "those on 66 SMs stand in another figure"
    assert decode["ours"] == pytest.approx(100 * 2000 / 3000)
    assert decode["cudnn"] == pytest.approx(100 * 2500 / 3000)
    assert bars["mlp"]["M=8192"]["ours"] == pytest.approx(100 * 500 / 750)
    assert bars["rms_norm"]["T=1 & <N>"]["ours"] == pytest.approx(100 * 2000 / 2500)


def test_points_of_the_roofline():
    points = roofline_points(Sheet.of(run()))
    found = [(p.kernel, p.flop_per_byte, p.tflop_s) for p in points]
    assert found == [
        ("decode_attention", 2.0, pytest.approx(4.0)),
        ("mlp", 1000.0, pytest.approx(500.0)),
    ]
    assert points[0].label == "decode_attention  B=64 context=4096"


def test_curves_against_sms():
    """A green context stands at the SMs it got; the curves are of ours and of the stream."""
    whole = (132, 100.0)
    assert sm_curves(Sheet.of(run())) == {
        "ceiling": [sheet.Curve("read stream", "grid", [(66, pytest.approx(50)), whole])],
        "decode_attention": [
            sheet.Curve("B=64 context=4096", "grid", [(66, pytest.approx(80)), whole]),
        ],
        "mlp": [sheet.Curve("M=8192", "green", [(64, pytest.approx(50)), whole])],
    }


def test_a_grid_as_large_as_the_gpu_is_the_whole_gpu():
    full = {"shape": "T=1 & <N>", "partitioning": "grid", "sms_asked": 132}
    curves = sm_curves(Sheet.of([*run(), reading("rms_norm", "ours", 2.0, 10**9, **full)]))
    assert "rms_norm" not in curves


def test_a_partition_is_held_against_the_peer_on_the_same():
    label = "mlp  M=8192  on 64 SMs, beside cublas chain"
    assert sheet.partition_ratios(Sheet.of(run())) == [(label, pytest.approx(1.25))]
    alone = [r for r in run() if (r.impl, r.partitioning) != ("cublas chain", "green")]
    assert sheet.partition_ratios(Sheet.of(alone)) == []


def test_the_newest_run_counts_with_its_own_ceilings():
    old, new = run(), run(date="2026-02-01 10:00", commit="def5678")
    new = [replace(r, ms_p50=r.ms_p50 / 2) for r in new if r.kernel in ("ceiling", "mlp")]
    for rows in (old + new, new + old):
        kept = newest(rows)
        assert len(kept) == len(old)
        assert {r.commit for r in kept if r.kernel == "mlp"} == {"def5678"}
        drawn = Sheet.of(rows)
        bars = percent_bars(drawn)
        # twice as fast on a machine found twice as fast; the old one stays with the old ceilings
        assert bars["mlp"]["M=8192"]["ours"] == pytest.approx(100 * 500 / 750)
        decode = bars["decode_attention"]["B=64 context=4096"]
        assert decode["ours"] == pytest.approx(100 * 2000 / 3000)
        assert drawn.roof.tflop_s == pytest.approx(1500)
        assert "abc1234" in drawn.title and "def5678" in drawn.title
        assert "2026-01-01 to 2026-02-01" in drawn.title


def test_of_two_readings_of_one_minute_the_later_line_counts():
    first, second = run()[7], replace(run()[7], ms_p50=9.0)
    assert newest([first, second]) == [second]


def test_of_two_gpus_one_is_drawn():
    rows = run() + run(gpu="NVIDIA H200", date="2026-03-01 10:00")
    assert Sheet.of(rows).gpu == "NVIDIA H200"
    assert Sheet.of(rows, "h100").gpu == "NVIDIA H100 80GB HBM3"
    for name in ("b200", "nvidia"):
        with pytest.raises(ValueError, match="--gpu must name one of"):
            Sheet.of(rows, name)


def test_the_command_makes_the_figures(tmp_path, capsys):
    path, out = write(tmp_path / "k.csv", run()), tmp_path / "new" / "figures"
    plot.main(["--csv", str(path), "--out", str(out)])
    names = {f"{name}.{kind}" for name in plot.FIGURES for kind in ("png", "svg")}
    assert {p.name for p in out.iterdir()} == names
    assert len(capsys.readouterr().out.split()) == len(names)
    for name in plot.FIGURES:
        text = (out / f"{name}.svg").read_text()
        assert "NVIDIA H100 80GB HBM3, commit abc1234, 2026-01-01" in text
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    roofline = (out / "kernels_roofline.svg").read_text()
    assert "read stream 3000 GB/s, matmul 750 TFLOP/s" in roofline
    assert "copy 2500 GB/s" in roofline and "arithmetic intensity, FLOP/byte" in roofline
    percent = (out / "kernels_percent.svg").read_text()
    assert "66.7" in percent and "cublas chain" in percent and "T=1 &amp; &lt;N&gt;" in percent
    sms = (out / "kernels_sms.svg").read_text()
    assert "num_sms alone (dashed), green context (solid)" in sms and ">read stream<" in sms
    assert "on 64 SMs, beside cublas chain" in (out / "kernels_partitions.svg").read_text()


def test_the_same_csv_gives_the_same_files(tmp_path):
    drawn = Sheet.of(run())
    first, second = (plot.write_figures(drawn, tmp_path / name) for name in "ab")
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


def test_figures_of_another_gpu_overwrite_none(tmp_path):
    rows = run() + run(gpu="NVIDIA H200", date="2026-03-01 10:00")
    rows += run(gpu="NVIDIA H100 PCIe", date="2026-02-01 10:00")
    argv = ["--csv", str(write(tmp_path / "k.csv", rows)), "--out", str(tmp_path / "out")]
    plot.main(argv)
    drawn = {path.name for path in (tmp_path / "out").iterdir()}
    assert drawn == {f"{name}_h200.{kind}" for name in plot.FIGURES for kind in ("png", "svg")}
    for gpu in ("h100 80", "pcie"):
        plot.main([*argv, "--gpu", gpu])
    assert len(list((tmp_path / "out").iterdir())) == 3 * len(drawn)
    for suffix, gpu in (("", "H100 80GB HBM3"), ("_h200", "H200"), ("_h100_pcie", "H100 PCIe")):
        text = (tmp_path / "out" / f"kernels_percent{suffix}.svg").read_text()
        assert f"NVIDIA {gpu}, commit" in text


def test_a_figure_without_readings_is_skipped_by_name(tmp_path, capsys):
    rows = [r for r in run() if r.sms_asked is None and r.kernel in ("ceiling", "rms_norm")]
    plot.main(["--csv", str(write(tmp_path / "k.csv", rows)), "--out", str(tmp_path)])
    text = capsys.readouterr().out
    for name in ("roofline", "sms", "partitions"):
        assert f"skipped kernels_{name}" in text
    assert not (tmp_path / "kernels_sms.svg").exists()
    assert (tmp_path / "kernels_percent.svg").exists()


def test_many_kernels_stand_in_two_columns():
    rows = run()
    rows += [replace(rows[7], shape=f"M={m}") for m in range(30)]
    norm = next(r for r in rows if r.kernel == "rms_norm")
    rows += [replace(norm, shape=f"T={t}") for t in range(30)]
    bars = percent_bars(Sheet.of(rows))
    assert plot._columns(bars) == [["decode_attention", "mlp"], ["rms_norm"]]
    assert plot._columns({"mlp": bars["mlp"]}) == [["mlp"]]


CELLS = ",".join(COLUMNS)
GOOD = "mlp,ours,s,bfloat16,none,,132,1,1,1,8,8,d,g,t,t,d,c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "must be a file of results, got none"),
        ("", "must have the columns"),
        ("a,b\n1,2\n", "must have the columns"),
        (f"{CELLS}\n", "must hold readings, got a header alone"),
        (f"{CELLS}\n{GOOD}\nmlp,ours\n", "line 3 must be a whole reading"),
        (f"{CELLS}\n{GOOD},more\n", "line 2 must be a whole reading"),
        (f"{CELLS}\n{GOOD.replace(',1,1,1,', ',1,x,1,')}\n", "line 2 must be a whole reading"),
        (f"{CELLS}\n{GOOD.replace(',1,1,1,', ',0,0,0,')}\n", "line 2 must be a whole reading"),
        (f"{CELLS}\n{GOOD.replace('none', 'grid')}\n", "line 2 must be a whole reading"),
        (f"{CELLS}\n{GOOD.replace(',,', ',64,')}\n", "line 2 must be a whole reading"),
        (f"{CELLS}\n{GOOD}\n", r"ceilings, got none for ['copy', 'matmul', 'read stream']"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(text, message, tmp_path):
    path = tmp_path / "k.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        plot.main(["--csv", str(path), "--out", str(tmp_path / "out")])
    assert str(stop.value).startswith("plot: ") and message in str(stop.value)
    assert "\n" not in str(stop.value) and not (tmp_path / "out").exists()


def test_ceilings_alone_are_nothing_to_draw():
    with pytest.raises(ValueError, match="got ceilings alone"):
        Sheet.of([r for r in run() if r.kernel == "ceiling"])
    with pytest.raises(ValueError, match="must hold readings, got none"):
        Sheet.of([])
    with pytest.raises(ValueError, match=r"run of 2026-01-01 10:00, commit abc1234"):
        Sheet.of([r for r in run() if r.impl != "copy"])


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        plot.main(["--help"])
    assert stop.value.code == 0 and "--csv" in capsys.readouterr().out


def test_an_unknown_kernel_comes_last():
    assert sheet._kernel_order("new one") > sheet._kernel_order("copy_blocks to peer")
