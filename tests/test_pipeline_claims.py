"""Claims 5 to 9: verdicts follow from made-up rows, and other claims stay where they are."""

from dataclasses import asdict, replace

import pytest

from experiments import claims as other_claims
from experiments import lifted_limits
from experiments.back_pressure import Pressure
from experiments.bench_handoff import HandoffReading
from experiments.bench_pipeline import Row as StepRow
from experiments.claims import read_csv, write_csv
from experiments.harness import RESULTS, append_row
from experiments.pipeline_claims import ASKED, NUM_PROMPTS, Row, configs, findings, main, newest
from tests.test_claims import LONG, run_of
from tests.test_plot import STAMP


def rows(tpot_ms: dict[str, float], gains: dict[int, float] | None = None) -> list[Row]:
    """Of every config and number of prompts; gains: of the pipelines, by prompts."""
    gains = dict.fromkeys(NUM_PROMPTS, 1.0) | (gains or {})
    found = []
    for config, ms in tpot_ms.items():
        for num in NUM_PROMPTS:
            split = config.split()[1] if " " in config else "none"
            t = ms / gains[num] if split != "none" else ms
            found.append(Row("Qwen3-0.6B", config, num, 32, 64, 64 * t / 1e3, t, split))
    return found


def judged(some: list[Row]) -> dict[int, list[tuple[str, str]]]:
    found: dict[int, list[tuple[str, str]]] = {}
    for f in findings({(row.config, row.prompts): row for row in some}, STAMP):
        found.setdefault(f.claim, []).append((f.over_one, f.verdict))
    return found


SLOW = {"one": 2.0, "pd": 2.0, f"pd {ASKED}": 4.0, "pd 48:84": 2.5, f"pd {ASKED} eager": 12.0}


def test_a_pipeline_that_loses_refutes_what_was_claimed():
    found = judged(rows(SLOW))
    assert found[5] == [("0.50", "refuted"), ("0.80", "refuted")]
    assert found[6] == [("0.80", "refuted")] and found[7] == [("0.80", "refuted")]
    assert found[8] == [("0.62", "refuted")] and found[9] == [("3.00", "lifted")]


def test_what_was_claimed_may_hold():
    fast = {"one": 2.0, "pd": 1.7, f"pd {ASKED}": 1.0, "pd 48:84": 1.02}
    found = judged(rows(fast, {1: 0.5, 2: 0.55, 4: 1.0, 16: 1.1, 64: 1.2}))
    assert found[5] == [("1.70", "holds")] and found[6] == [("2.00", "holds")]
    assert found[7] == [("2.04", "holds")] and found[8] == [("1.00", "holds")]
    assert 9 not in found


def test_a_split_that_was_not_had_does_not_count():
    some = [replace(row, partitioning="none") for row in rows(SLOW)]
    assert judged(some) == {} == judged(rows({"one": 1.0, "pd": 1.0}))


def test_other_claims_stay(tmp_path, capsys):
    source, claims = tmp_path / "rows.csv", tmp_path / "claims.csv"
    mine = other_claims.findings(run_of(LONG.workload, 2.0, 0.9, 1.0), "Qwen3-0.6B")
    of_another = [replace(mine[0], model="Qwen3-8B", claim=number) for number in (1, 5)]
    write_csv(claims, [*mine, *of_another])
    for row in rows(dict.fromkeys(SLOW, 9.0)):  # of an earlier commit
        append_row(source, asdict(row) | STAMP | {"commit": "old"})
    for row in rows(SLOW):
        append_row(source, asdict(row) | STAMP)
    for _ in range(2):
        others = ("--handoff", "--steps", "--checks", "--pressure")
        none = [part for name in others for part in (name, str(tmp_path / "none"))]
        main(["--csv", str(source), "--claims", str(claims), *none])
    assert [f.claim for f in read_csv(claims)] == [1, 1, 5, 5, 5, 6, 7, 8, 9]
    assert "| 5 | pipeline on PD, 4 prompts x 64, 48:84 | Qwen3-0.6B | 1.70x | 0.80x" in (
        capsys.readouterr().out
    )
    engine = tmp_path / "engine.csv"
    for reading in run_of(LONG.workload, 2.0, 0.9, 1.0):
        append_row(engine, asdict(reading))
    other_claims.main(["--from", str(engine), "--csv", str(claims)])
    assert [f.claim for f in read_csv(claims)] == [1, 1, 5, 5, 5, 6, 7, 8, 9]
    assert [f.model for f in read_csv(claims)].count("Qwen3-8B") == 2
    assert newest(source, "Qwen3-0.6B")[0]["pd", 4].tpot_ms == 2.0


def sent(mode: str, tokens: int, exposed_ms: float, **more) -> dict[str, str]:
    row = dict.fromkeys(HandoffReading.__dataclass_fields__, "") | STAMP
    row |= {"model": "Qwen3-0.6B", "way": "copy_engine", "mode": mode, "tokens": str(tokens)}
    return row | {"prefill_ms_p50": "10.0", "exposed_ms_p50": str(exposed_ms)} | more


SENT = [
    sent("push", 128, 0.1),
    sent("push", 4096, 0.0),
    sent("slab", 128, 0.4),
    sent("slab", 4096, 1.2),
    sent("push", 128, 9.0, date="2025-12-31 10:00"),  # of an earlier run
    sent("push", 128, 9.0, way="kernel"),
    sent("push", 128, 9.0, model="Qwen3-8B"),
]


def test_readings_of_hand_overs_say_which_limits_are_lifted():
    copies, memory = lifted_limits.handoff_findings(SENT, "Qwen3-0.6B")
    assert (copies.claim, copies.verdict) == (9, "lifted")
    assert copies.over_one == f"{1.12 / 1.01:.2f}" and "at most 1.0%" in copies.why
    assert "128 to 4096 tokens" in copies.why and "up to 12.0%" in copies.why
    assert (memory.verdict, memory.over_one) == ("lifted", "1.60")
    slow = [*SENT[:4], sent("push", 1024, 0.3)]
    assert lifted_limits.handoff_findings(slow, "Qwen3-0.6B")[0].verdict == "stands"
    assert lifted_limits.handoff_findings(SENT, "Qwen3-4B") == []


def step(mode: str, ms: float, batch: int = 512, **more) -> dict[str, str]:
    """A row of pipeline.csv; a split is "48:84"."""
    sms = mode.partition(":")[::2] if ":" in mode else ("", "")
    row = dict.fromkeys(StepRow.__dataclass_fields__, "") | STAMP
    row |= {"model": "Qwen3-0.6B", "batch": str(batch), "context": "4096", "mode": mode}
    row |= {"qkv_stage": "attention", "o_stage": "ffn", "num_micro_batches": "2"}
    row |= {"attention_sms": sms[0], "ffn_sms": sms[1]}
    row |= {"num_layers": "28", "ends_ms": "1.0", "ms_p50": str(ms)}
    return row | {"gpu": "one of no known rates"} | more


def test_one_split_for_all_is_held_against_the_rule():
    map_rows = [
        step("serial", 10.0),
        step("48:84", 12.5),
        step("32:100", 9.0),
        step("serial", 10.0, batch=1024),
        step("48:84", 9.5, batch=1024),
        step("serial", 10.0, gpu="another", date="2020-01-01 00:00"),
        step("48:84", 90.0, gpu="another", date="2020-01-01 00:00"),
    ]
    (found,) = lifted_limits.split_findings(map_rows, "Qwen3-0.6B")
    assert (found.claim, found.statement, found.verdict) == (9, "limit: static split", "stands")
    assert found.over_one == "1.25" and "(512 requests of 4096 tokens, 2 cells)" in found.why
    assert found.why.endswith("What auto chose was not read again.")
    assert found.command.endswith("--map --model Qwen3-0.6B --layers 28")
    assert lifted_limits.split_findings(map_rows, "Qwen3-4B") == []
    few = [row | {"num_layers": "6", "ends_ms": "0.5"} for row in map_rows[:5]]
    assert lifted_limits.split_findings([*few, *map_rows], "Qwen3-0.6B") == [found]
    deep = [
        step(mode, 10.0, context=str(n), num_layers="6", ends_ms="0.5")
        for n in range(1, 5)
        for mode in ("serial", "48:84")
    ]
    (of_more_cells,) = lifted_limits.split_findings([*few, *deep, *map_rows], "Qwen3-0.6B")
    assert of_more_cells.command.endswith("--layers 6")
    near = [step("serial", 10.0), step("48:84", 9.95)]  # the rule loses here, of no account
    aside = lifted_limits.split_findings([*few, *deep, *near], "Qwen3-0.6B")
    assert [one.why for one in aside] == [of_more_cells.why]
    day = "2029-01-01 00:00"
    later = [row | {"date": day} for row in map_rows[:2]]
    (of_two_days,) = lifted_limits.split_findings([*map_rows, *later], "Qwen3-0.6B")
    assert of_two_days.date == day
    newer = {"date": "2030-01-01 00:00", "commit": "new", "num_layers": "6", "ends_ms": "0.5"}
    old = {"date": "2020-01-01 00:00", "gpu": "another"}
    others = [*(row | newer for row in map_rows[:2]), *(row | old for row in deep)]
    assert lifted_limits.split_findings([*map_rows, *others], "Qwen3-0.6B") == [found]
    assert lifted_limits.split_findings([*deep, *map_rows], "Qwen3-0.6B") == [found]
    without = [row | {"mode": "64:68"} if row["mode"] == "48:84" else row for row in map_rows]
    (of_the_split,) = lifted_limits.split_findings([*few, *without], "Qwen3-0.6B")
    assert of_the_split.command.endswith("--layers 6")
    assert lifted_limits.split_findings(without, "Qwen3-0.6B") == []
    assert lifted_limits.split_findings([step("serial", 10.0)], "Qwen3-0.6B") == []


def check(mode: str, ms: float, *, is_chosen: bool = False, batch: int = 512, **more) -> dict:
    """A row of auto_check.csv."""
    row = STAMP | {"model": "Qwen3-8B", "num_layers": "36", "max_num_seqs": "1024"}
    row |= {"batch": str(batch), "context": "128", "mode": mode, "ms": str(ms)}
    row |= {"auto_ms": "1.0"}
    return row | {"is_chosen": str(is_chosen)} | more


def test_the_choices_of_auto_are_judged_by_longer_readings():
    """Not by the times that they were made from."""
    steps = [step("serial", 10.0), step("48:84", 12.5)]
    small = {"model": "Qwen3-4B"}
    checks = [
        check("serial", 10.0, is_chosen=True),
        check("48:84", 9.9),
        check("serial", 10.0, batch=1024),
        check("48:84", 9.0, is_chosen=True, batch=1024),
        check("serial", 10.0, is_chosen=True, batch=1024, max_num_seqs="2048"),  # another engine
        check("48:84", 11.0, batch=1024, max_num_seqs="2048"),
        check("serial", 10.0, is_chosen=True, **small),
        check("48:84", 10.5, **small),
        check("serial", 10.0, is_chosen=True, date="2020-01-01 00:00", commit="old"),
        check("48:84", 5.0, date="2020-01-01 00:00", commit="old"),
    ]
    later = {"max_num_seqs": "512", "date": "2099-01-01 00:00", "commit": "new"}
    checks += [check("serial", 10.0, is_chosen=True, batch=256, **later)]  # hides no other size
    checks += [check("48:84", 11.0, batch=256, **later)]
    (found,) = lifted_limits.split_findings(steps, "Qwen3-0.6B", checks)
    assert found.verdict == "lifted"
    assert "at most 1.0% longer (Qwen3-8B, 512 x 128)" in found.why and "in 5 of" in found.why
    more = [*checks, check("64:68", 9.7, **small)]
    (found,) = lifted_limits.split_findings(steps, "Qwen3-0.6B", more)
    assert found.verdict == "stands" and "at most 3.1% longer (Qwen3-4B" in found.why


def test_a_burst_says_whether_prefill_is_held_back():
    row = dict.fromkeys(Pressure.__dataclass_fields__, "8") | STAMP
    row |= {"model": "Qwen3-0.6B", "config": "bounded", "computed": "1.0", "seconds": "1.0"}
    free = row | {"config": "unbounded", "peak_backlog": "30", "computed": "1.5"}
    (found,) = lifted_limits.pressure_findings([row, free], "Qwen3-0.6B")
    assert (found.statement, found.verdict) == ("limit: no back-pressure", "lifted")
    assert found.over_one == "1.50" and "at most 8 prompts ahead of decode (bound 8)" in found.why
    assert found.command.endswith("--prompt 8 --output 8 --held 8 --backlog 8")
    over = row | {"peak_backlog": "9"}
    (found,) = lifted_limits.pressure_findings([over, free], "Qwen3-0.6B")
    assert found.verdict == "stands"
    assert lifted_limits.pressure_findings([row], "Qwen3-0.6B") == []


def test_a_run_that_was_cut_off_says_nothing(tmp_path):
    """The newest that is whole does, wherever its last row stands."""
    source, cut = tmp_path / "rows.csv", [row for row in rows(SLOW) if row.config == "one"]
    for row in cut:
        append_row(source, asdict(row) | STAMP | {"commit": "cut"})
    with pytest.raises(ValueError, match="for one, pd and a split in one run, got 5 rows"):
        newest(source, "Qwen3-0.6B")
    for row in rows(SLOW):
        append_row(source, asdict(row) | STAMP)
    for row in cut:
        append_row(source, asdict(row) | STAMP | {"commit": "cut later"})
    read, stamp = newest(source, "Qwen3-0.6B")
    assert stamp["commit"] == STAMP["commit"] and len(read) == len(rows(SLOW))


def test_the_committed_claims_follow_from_the_committed_rows(tmp_path):
    committed, made = RESULTS / "claims.csv", tmp_path / "claims.csv"
    made.write_text(committed.read_text())
    main(["--claims", str(made)])
    other_claims.main(["--from", str(RESULTS / "engine.csv"), "--csv", str(made)])
    assert made.read_text() == committed.read_text()


def test_without_rows_or_gpus_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    argv = ["--csv", str(tmp_path / "rows.csv"), "--claims", str(tmp_path / "claims.csv")]
    for more in ([], ["--measure"]):
        with pytest.raises(SystemExit):
            main([*argv, *more])
    errors = capsys.readouterr().err
    assert "must be a file of results, got none" in errors and "needs two GPUs, got 1" in errors
    assert not list(tmp_path.iterdir())


def test_configs_are_options_of_an_engine():
    from engine.config import EngineConfig

    found = configs()
    assert list(found)[:3] == ["one", "pd", f"pd {ASKED}"]
    for options in found.values():
        EngineConfig.from_options("m", **options)
    assert found[f"pd {ASKED}"]["decode_attention_sm"] == 16
