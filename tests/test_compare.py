"""The comparison: medians of the newest run with both, and the aim of TPOT under load."""

from dataclasses import asdict, replace

import pytest

from experiments.compare import main, ratio, runs_of, table
from experiments.harness import append_row
from tests.test_claims import BASE

LOAD = {"workload": "poisson-1024-128", "load": 0.8, "rate": 20.0}


def reading(config, output_tok_s, tpot_ms_p99=10.0, **fields):
    times = {"ttft_ms_p50": 100.0, "tpot_ms_p99": tpot_ms_p99}
    return replace(BASE, config=config, output_tok_s=output_tok_s, **times | fields)


CLOSED = [
    *(reading("one", s) for s in (900.0, 1000.0, 1300.0)),
    reading("replicas", 2000.0),
    *(reading("pd", s) for s in (1000.0, 1500.0, 9000.0)),
]
ARRIVALS = [reading("replicas", 2000.0, **LOAD), reading("pd", 1990.0, 7.5, **LOAD)]


def test_a_line_for_each_run():
    lines = table(runs_of([*CLOSED, *ARRIVALS])).splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert lines[2] == (
        "| Qwen3-0.6B | fixed |  | 1,000 | 2,000 | 1,500 | 0.75x | 100 | 100 | 10.00 | 10.00 "
        f"| {BASE.gpus} x {BASE.gpu}, {BASE.commit} |"
    )
    assert lines[3].startswith("| Qwen3-0.6B | poisson-1024-128 | 0.80 |  | 2,000 | 1,990 | 0.99x")
    assert lines[4] == "" and len(lines) == 6


@pytest.mark.parametrize(
    ("output_tok_s", "tpot_ms_p99", "found"),
    [
        (2000.0, 8.0, "0.80x of theirs, aim 0.80x, at 1.00x of their throughput: holds."),
        (2000.0, 8.1, "0.81x of theirs, aim 0.80x, at 1.00x of their throughput: missed."),
        (1900.0, 8.0, "at 0.95x of their throughput: no equal throughput."),
        (1900.0, None, "no TPOT."),
    ],
)
def test_the_aim_of_tpot(output_tok_s, tpot_ms_p99, found):
    run = [ARRIVALS[0], reading("pd", output_tok_s, tpot_ms_p99, **LOAD)]
    assert table(runs_of(run)).splitlines()[-1].endswith(found)


def test_the_newest_run_with_both_counts():
    newer = [replace(r, date="2026-01-03", output_tok_s=3000.0) for r in ARRIVALS]
    half = [replace(newer[1], date="2026-01-04", output_tok_s=1.0)]
    others = [replace(r, load=0.5) for r in ARRIVALS]
    [run, other] = runs_of([*newer, *ARRIVALS, *half, *others])
    assert [r.output_tok_s for r in run["pd"]] == [3000.0]
    assert [r.load for r in other["pd"]] == [0.5] and ratio(other, "output_tok_s") < 1
    assert runs_of(half) == [] and runs_of(newer, ["Qwen3-8B"]) == []


def test_each_gpu_has_a_line_of_its_own():
    """Or a newer one's would stand in for another's miss."""
    others = [replace(r, gpu="another", date="2027-01-01", tpot_ms_p99=20.0) for r in ARRIVALS]
    lines = table(runs_of([*ARRIVALS, *others])).splitlines()
    assert [line.split(" | ")[-1].split(",")[0] for line in lines[2:4]] == [
        f"{BASE.gpus} x {gpu}" for gpu in (BASE.gpu, "another")
    ]
    assert [line.rpartition(": ")[2] for line in lines[-2:]] == ["holds.", "missed."]


def test_the_command_prints_what_a_file_has(tmp_path, capsys):
    path = tmp_path / "engine.csv"
    for row in CLOSED:
        append_row(path, asdict(row))
    main(["--from", str(path)])
    assert "| fixed |" in capsys.readouterr().out
    for argv in (["--model", "Qwen3-8B"], ["--from", str(tmp_path / "none.csv")]):
        with pytest.raises(SystemExit):
            main(["--from", str(path), *argv])
        assert "must" in capsys.readouterr().err
