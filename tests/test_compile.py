"""Every kernel compiles for sm_90 on this machine, GPU or not, as its launcher would launch it; and
none that serving needs is left to be compiled while it serves."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import kernels

SHARED_BYTES = 227 * 1024  # what a block may hold on an H100


def run_module(name: str, *arguments: str) -> list[dict]:
    """The JSON lines of a process of its own: Triton compiles nothing where it interprets."""
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.{name}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def compile_all() -> list[dict]:
    jobs = max(2, (os.cpu_count() or 2) // 4)  # beside the other tests
    return run_module("compile_kernels", "--jobs", str(jobs))


def wants_wgmma(report: dict) -> bool:
    """Matrix kernels, from the 64 rows on that wgmma takes at a time; it knows no fp32."""
    if report["dtype"] == "fp32":
        return False
    if report["kernel"] == "_thin_matmul_kernel":
        return report["constexprs"]["BLOCK_M"] >= 64
    kernels_of_many_tokens = "_prefill_attention", "_prefill_pipeline", "_tall_matmul"
    return report["kernel"] in [f"{name}_kernel" for name in kernels_of_many_tokens]


def spills(report: dict) -> bool:
    return report["spills"] > 0 or report["stack_bytes"] > 0


def test_every_kernel_compiles_without_spills_and_with_wgmma():
    # one test, since its compilation takes a minute: two would do it again in every worker
    lines = compile_all()
    reports = [line for line in lines if line["phase"] != "squeezed"]
    sources = Path(kernels.__file__).parent.glob("*.py")
    defined = {name for s in sources for name in re.findall(r"def (_\w+_kernel)\(", s.read_text())}
    assert {report["kernel"] for report in reports} == defined

    gated = {r["constexprs"].get("GATED") for r in reports if wants_wgmma(r)}
    assert gated == {None, False, True}  # attention, linear, gate_up
    # the measure of spills can fail: a tile far too large for its warps does spill
    assert [line["spills"] > 0 for line in lines if line["phase"] == "squeezed"] == [True]

    findings = {
        "spills": [r for r in reports if spills(r)],
        "too much shared memory": [r for r in reports if r["shared_bytes"] > SHARED_BYTES],
        "no wgmma": [r for r in reports if wants_wgmma(r) and not r["wgmma"]],
    }
    found = {f"{name}: {json.dumps(r)}" for name, bad in findings.items() for r in bad}
    assert not found, "\n".join(sorted(found))


def test_no_prefill_compiles_a_kernel_behind_the_warm_up():
    """Half a second in the middle of somebody's prompt. That of powers of two alone did not do."""
    for case in run_module("compiled_late"):
        assert case["warm_up_lengths"] == [], case
        assert case["powers_of_two"], case
