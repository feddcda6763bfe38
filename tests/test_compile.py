"""Every kernel compiles for sm_90 on this machine, GPU or not, as its launcher would launch it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import kernels

SHARED_BYTES = 227 * 1024  # what a block may hold on an H100


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    """One process of its own: Triton compiles nothing where it interprets."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.compile_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def reports(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["phase"] != "squeezed"]


def test_every_kernel_is_compiled(reports):
    sources = Path(kernels.__file__).parent.glob("*.py")
    defined = {name for s in sources for name in re.findall(r"def (_\w+_kernel)\(", s.read_text())}
    assert {report["kernel"] for report in reports} == defined


def test_no_kernel_spills(reports):
    assert_none(report for report in reports if report["spills"] or report["stack_bytes"])


def test_spills_are_seen(lines):
    """The measure can fail: a tile far too large for its warps does spill."""
    assert [line["spills"] > 0 for line in lines if line["phase"] == "squeezed"] == [True]


def test_shared_memory_fits(reports):
    assert_none(report for report in reports if report["shared_bytes"] > SHARED_BYTES)


def test_matrix_kernels_use_wgmma(reports):
    tall = [
        report
        for report in reports
        if report["kernel"] == "_prefill_attention_kernel"
        or (report["kernel"] == "_matmul_kernel" and report["rows"] >= 64)
    ]
    assert {report["constexprs"].get("GATED") for report in tall} == {None, False, True}
    assert_none(report for report in tall if not report["wgmma"])


def assert_none(bad: Iterable[dict]) -> None:
    distinct = {json.dumps(report) for report in bad}
    assert not distinct, "\n".join(sorted(distinct))
