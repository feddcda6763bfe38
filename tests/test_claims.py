"""Claims: the verdict follows from the rows, by the rule, and from the run that has them all."""

import csv
import itertools
from dataclasses import asdict, replace

import pytest

from experiments.claims import CLAIMS, findings, judge, main, newest_run, table, verdict
from experiments.harness import append_row
from experiments.workloads import CLOSED
from tests.test_engine_csv import READING

BASE = replace(READING, load=None, rate=None, eager=False, gpu="H100", date="2026-01-02")
LONG = CLAIMS[0]


def run_of(workload, one, replicas, pd, **fields):
    """A reading of each configuration, by its seconds."""
    return [
        replace(BASE, workload=workload, config=config, seconds=seconds, gpus=gpus, **fields)
        for config, seconds, gpus in (("one", one, 1), ("replicas", replicas, 2), ("pd", pd, 2))
    ]


@pytest.mark.parametrize(
    ("over_one", "over_replicas", "found"),
    [
        (1.8, 1.0, "holds"),
        (1.72, 1.3, "holds"),  # 95 % of 1.8 is 1.71
        (1.72, 0.99, "holds only against a weak baseline"),
        (1.70, 0.99, "refuted"),
        (1.70, 1.3, "refuted"),
    ],
)
def test_the_rule(over_one, over_replicas, found):
    assert verdict(1.8, over_one, over_replicas) == found


def test_figures_are_ratios_of_times():
    [found] = findings(run_of("long-prompts-256", 2.0, 0.9, 1.0), "Qwen3-0.6B")
    assert (found.claim, found.claimed) == (1, "1.80")
    assert (found.over_one, found.over_replicas) == ("2.00", "0.90")
    assert found.verdict == "holds only against a weak baseline"
    for part in ("2000 ms", "1000 ms", "2.00x, 111% of the 1.80x", "2.22x of one", "0.90x of them"):
        assert part in found.why
    assert found.command.endswith("--model Qwen3-0.6B --workloads long-prompts-256")
    assert (found.hardware, found.commit) == ("2 x H100", "abc")


def test_medians_of_the_newest_whole_run_count():
    old = run_of(LONG.workload, 8.0, 8.0, 1.0, date="2026-01-01")
    new = run_of(LONG.workload, 2.0, 1.0, 1.0)
    more = [replace(new[2], seconds=s) for s in (4.0, 5.0)]
    half = run_of(LONG.workload, 9.0, 9.0, 9.0, date="2026-01-03")[:2]
    others = run_of(LONG.workload, 9.0, 9.0, 9.0, date="2026-01-04", model="Qwen3-8B")
    eager = run_of(LONG.workload, 9.0, 9.0, 9.0, date="2026-01-04", eager=True)
    for order in itertools.permutations([old, new + more, half, others + eager]):
        run = newest_run(list(itertools.chain(*order)), "Qwen3-0.6B", LONG.workload)
        assert judge(LONG, run).pd_s == "4.0000"
    assert newest_run(half, "Qwen3-0.6B", LONG.workload) is None


def test_work_that_was_not_the_same_is_refused():
    readings = run_of(LONG.workload, 2.0, 1.0, 1.0)
    readings[0] = replace(readings[0], output_tokens=1)
    with pytest.raises(ValueError, match="must be the same work"):
        findings(readings, "Qwen3-0.6B")


def test_every_claim_has_a_workload():
    assert {claim.number for claim in CLAIMS} == {1, 2, 3, 4}
    assert all(claim.workload in CLOSED for claim in CLAIMS)


def test_the_command_writes_and_prints(tmp_path, capsys):
    source, out = tmp_path / "engine.csv", tmp_path / "claims.csv"
    for claim, seconds in zip(CLAIMS[:4], (1.0, 0.5, 0.8, 1.2), strict=True):
        for reading in run_of(claim.workload, 1.9 * seconds, 1.1 * seconds, seconds):
            append_row(source, asdict(reading))
    main(["--from", str(source), "--csv", str(out)])
    written = capsys.readouterr().out
    rows = list(csv.DictReader(out.open()))
    assert [row["claim"] for row in rows] == ["1", "2", "3", "3"]
    for row in rows:
        ratios = [float(row[f"{c}_s"]) / float(row["pd_s"]) for c in ("one", "replicas")]
        assert [f"{ratio:.2f}" for ratio in ratios] == [row["over_one"], row["over_replicas"]]
        assert row["verdict"] == verdict(float(row["claimed"]), *ratios) == "holds"
    main(["--csv", str(out)])
    assert capsys.readouterr().out == written
    assert written.count("| 1.90x | 1.10x | holds |") == 4
    assert written.rstrip().endswith("Not measured: 4 (burst-256-64).")


def test_nothing_measured_writes_nothing(tmp_path, capsys):
    source, out = tmp_path / "engine.csv", tmp_path / "claims.csv"
    append_row(source, asdict(BASE))
    for argv in (["--from", str(source), "--csv", str(out)], ["--csv", str(out)]):
        with pytest.raises(SystemExit):
            main(argv)
    errors = capsys.readouterr().err
    assert "must have one, replicas, pd for a claim's workload, got none" in errors
    assert "must be a file of results, got none" in errors and not out.exists()
    assert table([]).endswith("4 (burst-256-64).")
