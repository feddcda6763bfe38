"""The page of the targets: what a row says, what was not measured, a section for each GPU."""

from dataclasses import replace

from experiments.readings import Reading
from experiments.sheet import HOME_GPU
from experiments.target import EngineTarget, Target
from experiments.targets_page import FEW, Line, engine_lines, kernel_lines, page, table
from tests.test_engine_csv import READING
from tests.test_targets import CEILINGS, reading, sheet


def test_the_table_says_what_holds_and_what_was_not_measured():
    aim = Target(kernel="decode_attention", shape="B=1", measure="share", want=60)
    missing = replace(aim, shape="B=9", beside="cudnn", num_sms=56, partitioning="green")
    unheld = replace(aim, measure="peer", beside="cudnn")
    found = sheet(reading("decode_attention", "ours", 1.0))
    lines = kernel_lines(found, [aim, replace(aim, want=50, is_beyond=True), missing, unheld])
    lines += engine_lines("H100", [EngineTarget("Qwen3-8B", "fixed", 6900, 6400)], [])
    half = "50 % of the ceiling"
    assert table(lines).splitlines() == [
        "| kernel | shape | target | measured | holds |",
        "|---|---|---|---|---|",
        f"| decode_attention | B=1 | at least 60 % of the ceiling | {half} | **no** |",
        f"| decode_attention | B=1 | beyond: at least {half} | {half} | yes |",
        "",
        "Not measured:",
        "- decode_attention: B=9, 56 SMs (green)",
        "- decode_attention beside cudnn: B=1",
        "- nothing of engine",
    ]
    assert "Not measured" not in table(lines[:2])


def test_what_is_missing_is_said_in_few_words():
    """A kernel without any reading by its name, many shapes by how many they are."""
    aim = Target(kernel="mlp", shape="", measure="peer", want=1.0, beside="cublas chain")
    mlp = [replace(aim, shape=f"M={m}") for m in range(FEW + 3)]
    aims = [*mlp, *(replace(a, measure="share", beside="") for a in mlp)]
    aims += [replace(aim, kernel=kernel, shape="s") for kernel in ("sample", "copy_blocks")]
    readings = [reading("mlp", "ours", 1.0, shape=a.shape) for a in mlp]
    lines = table(kernel_lines(sheet(*readings), aims)).splitlines()
    shapes = "; ".join(f"M={m}" for m in range(FEW))
    assert lines[-2:] == [
        f"- mlp beside cublas chain: {shapes}; and 3 more",
        "- nothing of sample, copy_blocks",
    ]
    lines = table(kernel_lines(sheet(*readings[:FEW]), aims)).splitlines()
    assert f"- mlp: M={FEW}; M={FEW + 1}; M={FEW + 2}" in lines
    alone = reading("copy_blocks", "ours", 1.0, shape="s")
    lines = table(kernel_lines(sheet(alone), aims)).splitlines()
    assert lines[-2:] == ["- copy_blocks beside cublas chain: s", "- nothing of mlp, sample"]


def test_rows_say_their_commit_where_there_are_several():
    aim = Target(kernel="sample", shape="B=1 x", measure="reads", want=1.5)
    later = {"date": "2026-02-01", "commit": "def"}
    rerun = [replace(r, **later) for r in CEILINGS]
    rerun.append(reading("sample", "ours", 0.25, **later))
    old = [reading("sample", "ours", 1.0), reading("mlp", "ours", 1.0)]
    lines = kernel_lines(sheet(*old, *rerun), [aim, replace(aim, kernel="mlp")])
    bound = "at most 1.50 reads of the logits"
    assert table(lines).splitlines() == [
        "| kernel | shape | target | measured | holds | commit |",
        "|---|---|---|---|---|---|",
        f"| sample | B=1 x | {bound} | 0.50 reads of the logits | yes | def |",
        f"| mlp | B=1 x | {bound} | 2.00 reads of the logits | **no** | abc |",
    ]
    of_the_engine = Line(kernel="engine", where="m w", bound="b", measured="9", commit="def")
    assert "| commit |" in table([lines[1], of_the_engine])
    assert "| commit |" not in table(lines[:1]) and "def" not in table(lines[:1])


def on(gpu: str, commit: str, *more: Reading, **stamp: str) -> list[Reading]:
    """Ceilings and the readings, as of that GPU."""
    versions = {"torch": "2.11.0", "triton": "3.6.0", "driver": "580"} | stamp
    return [replace(r, gpu=gpu, commit=commit, **versions) for r in [*CEILINGS, *more]]


def test_every_gpu_has_a_section_that_of_the_aims_first():
    """And none has a figure of another's."""
    aim = Target(kernel="sample", shape="B=1 x", measure="reads", want=1.5)
    engine_aim = EngineTarget("m", "w", 150, 120)
    one = replace(READING, model="m", workload="w", config="one", eager=False)
    fast = [reading("sample", "ours", 0.5), reading("mlp", "ours", 1.0)]
    rows = [
        *on("NVIDIA H200", "new", *fast, date="2026-02-01", driver="590"),
        *on(HOME_GPU, "old", reading("sample", "ours", 1.0)),
        *on("NVIDIA H200 NVL", "new", reading("sample", "ours", 2.0)),
        *on("A100", "new", reading("mlp", "ours", 1.0)),
    ]
    engine = [replace(one, gpu=HOME_GPU, output_tok_s=200, commit="old")]
    head, *sections = page(rows, [aim], [engine_aim], engine).split("\n## ")
    assert head.startswith("# Kernels beside their targets\n") and "|" not in head
    assert head.count("The aims were set for an H100") == 1
    home, a100, h200, nvl = sections
    assert home.startswith(f"{HOME_GPU}\n\ntorch 2.11.0; Triton 3.6.0; driver 580; commit old.\n")
    assert "2.00 reads" in home and "| 200 tokens/s | yes |" in home
    assert "Not measured" not in home and "| commit |" not in home
    assert h200.startswith("NVIDIA H200\n\ntorch 2.11.0; Triton 3.6.0; driver 590; commit new.\n")
    assert "1.00 reads" in h200 and h200.endswith("\nNot measured:\n- nothing of engine\n")
    assert nvl.startswith("NVIDIA H200 NVL\n") and "4.00 reads" in nvl
    assert a100.startswith("A100\n") and "- nothing of sample, engine" in a100


def test_a_section_names_all_versions_the_newest_first():
    aim = Target(kernel="sample", shape="B=1 x", measure="reads", want=1.5)
    again = [reading("sample", "ours", 1.0), reading("mlp", "ours", 1.0)]
    rows = on(HOME_GPU, "abc", *again) + on(
        HOME_GPU, "aaa", again[0], date="2026-02-01", driver="590", torch="2.12.0"
    )
    stamp = "torch 2.12.0, 2.11.0; Triton 3.6.0; driver 590, 580; commit aaa, abc."
    assert stamp in page(rows, [aim], [], []).splitlines()
