"""Imports point one way: experiments -> engine -> models -> kernels, and engine -> green."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "models", "green", "engine", "experiments", "tests")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "green": {"green"},
    "models": {"models", "kernels"},
    "engine": {"engine", "models", "kernels", "green"},
    "experiments": {"experiments", "engine", "models", "kernels", "green"},
}
# plain Python: they run, and are tested, without a device or seconds of imports
NO_TORCH = ["engine/scheduler.py", "engine/block_manager.py", "engine/request.py"]
NO_TORCH += ["engine/base_scheduler.py", "engine/pd_scheduler.py", "engine/lease.py"]
NO_TORCH += ["engine/detokenizer.py", "engine/interrupt.py", "engine/stats.py"]
NO_TORCH += ["engine/happens_before.py", "engine/micro_batches.py", "engine/stage_schedule.py"]
NO_TORCH += ["engine/pipeline_stats.py", "green/partition.py", "engine/step_model.py"]
NO_TORCH += ["engine/pipeline_choice.py", "engine/calibration_file.py"]
DEVICE_LIBRARIES = {"torch", "triton", "cuda", "transformers"}


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Names of the modules that a file imports, wherever in it."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} must import by the full name"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def rooms_of(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names} & set(ROOMS)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below_it(room):
    for path in files(room):
        extra = rooms_of(imported(path)) - MAY_IMPORT[room]
        assert not extra, f"{path.relative_to(ROOT)} must not import {sorted(extra)}"


def test_references_import_only_torch():
    names = {name.partition(".")[0] for name in imported(ROOT / "kernels" / "reference.py")}
    assert names - set(sys.stdlib_module_names) == {"torch"}


@pytest.mark.parametrize("name", NO_TORCH)
def test_host_side_modules_know_no_device(name):
    names = {module.partition(".")[0] for module in imported(ROOT / name)}
    assert not names & DEVICE_LIBRARIES


@pytest.mark.parametrize("room", ["models", "engine"])
def test_triton_is_imported_only_where_it_is_used(room):
    """A CPU runs on the references, where there may be no Triton: Windows, macOS."""
    for path in files(room):
        names = imported(path, top_level_only=True)
        assert not {name.partition(".")[0] for name in names} & {"triton"}, path
        ours = {name for name in names if name.partition(".")[0] == "kernels"}
        assert ours <= {"kernels", "kernels.reference"} and not ours, path


def test_no_module_looks_like_a_test_or_a_script_of_somebody():
    for room in MAY_IMPORT:
        for path in files(room):
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path} says not what it is"


def test_importing_the_engine_loads_neither_triton_nor_transformers():
    code = (
        "import sys; import engine; from engine import LLM, SamplingParams;"
        "print([m for m in ('triton', 'transformers', 'kernels') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
