"""Targets: the right readings are found, and a figure is judged the right way round."""

from dataclasses import replace

import pytest

from experiments.bench_kernels import all_cases, takes_num_sms
from experiments.readings import BANDWIDTH, Reading
from experiments.sheet import Sheet
from experiments.targets import Target, main, table, targets

RUN = {"gpu": "H100", "date": "2026-01-02", "commit": "abc"}


def reading(kernel: str, impl: str, ms: float, **fields: object) -> Reading:
    common = {"shape": "B=1 x", "dtype": "bfloat16", "sms_asked": None, "sms_granted": 132}
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


def test_figures():
    """1 GB at 1 ms; the stream reads it in half of that."""
    ours = reading("decode_attention", "ours", 1.0)
    found = sheet(
        ours,
        reading("decode_attention", "slow", 3.0),
        reading("decode_attention", "fast", 0.9),
        replace(ours, sms_asked=56, ms_p50=1.25),
        replace(ours, shape="B=2 y", ms_p50=0.8),
    )
    aim = Target(kernel="decode_attention", shape="B=1 ", measure="share", want=50)
    figures = {
        "share": 50.0,
        "peer": 0.9,
        "reads": 2.0,
        "rate": 0.0,
    }
    for measure, figure in figures.items():
        assert replace(aim, measure=measure).figure(found) == pytest.approx(figure)
    assert replace(aim, measure="whole", num_sms=56).figure(found) == pytest.approx(80)
    assert replace(aim, measure="even", beside="B=2 ").figure(found) == pytest.approx(0.8)
    assert replace(aim, shape="B=3 ").figure(found) is None
    assert replace(aim, measure="even", beside="B=3 ").figure(found) is None
    assert replace(aim, measure="peer").figure(sheet(ours)) is None


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
    aim = Target(kernel="decode_attention", shape="B=1 ", measure="share", want=50)
    assert aim.figure(found) == pytest.approx(50)
    assert replace(aim, measure="peer").figure(found) is None


def test_the_table_says_what_holds_and_what_was_not_measured():
    aim = Target(kernel="decode_attention", shape="B=1 ", measure="share", want=60)
    lines = table(
        sheet(reading("decode_attention", "ours", 1.0)),
        [aim, replace(aim, want=50), replace(aim, shape="B=9 ", num_sms=56)],
    ).splitlines()
    assert lines[2].endswith("| at least 60 % of the ceiling | 50 % of the ceiling | **no** |")
    assert lines[3].endswith("| yes |")
    assert lines[-1] == "Not measured: decode_attention B=9, 56 SMs."


def test_every_target_names_a_case_of_the_benchmark():
    for aim in targets():
        assert aim.kernel in BANDWIDTH
        cases = [c for c in all_cases() if c.kernel == aim.kernel]
        for shape in filter(None, (aim.shape, aim.beside)):
            assert any(c.shape.startswith(shape) for c in cases), shape
        if aim.num_sms is not None:
            sweeps = [c.sweep for c in cases if c.shape.startswith(aim.shape)]
            assert takes_num_sms(aim.kernel) and all(sweeps)


def test_the_page_is_written(tmp_path):
    from dataclasses import asdict

    from experiments.harness import append_row

    path, out = tmp_path / "kernels.csv", tmp_path / "kernels.md"
    for r in [*CEILINGS, reading("sample", "ours", 1.0, shape="B=256 V=151936 greedy")]:
        append_row(path, asdict(r))
    main(["--csv", str(path), "--out", str(out)])
    assert "| sample | B=256 V=151936 greedy | at most 1.50 reads of the logits | 2.00" in (
        out.read_text()
    )
