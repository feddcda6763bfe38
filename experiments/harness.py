"""What every measurement shares: the stamp of where it ran, and one CSV row per reading."""

import csv
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"

T = TypeVar("T")


def environment(device: torch.device | str) -> dict[str, str]:
    """GPU, versions and commit of a run. A checkout without git takes GREENLANE_COMMIT."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "gpu": torch.cuda.get_device_name(device) if is_cuda else f"cpu {platform.machine()}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": _driver() if is_cuda else "",
        "commit": os.environ.get("GREENLANE_COMMIT") or _commit(),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _driver() -> str:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return _output(*query).partition("\n")[0]


def _commit() -> str:
    """The short hash, with "+" where tracked files differ from it; "unknown" outside git."""
    commit = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return (commit + "+" * bool(changed)) or "unknown"


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row; the first one writes the header. Other columns than the file's: ValueError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != list(row):
            raise ValueError(f"{path} must have the columns {list(row)}, got {header}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path: Path, columns: list[str]) -> list[dict[str, str]]:
    """Every row under the header. ValueError where there is no file, or one of other columns."""
    if not path.exists():
        raise ValueError(f"{path} must be a file of results, got none")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != columns:
            raise ValueError(f"{path} must have the columns {columns}, got {reader.fieldnames}")
        return list(reader)


def read_as(kind: type[T], row: Mapping[str, str]) -> T:
    """A row as the dataclass of its measurement, of plain types alone; the other columns are the
    stamp."""
    return kind(**{field.name: field.type(row[field.name]) for field in fields(kind)})


def table(rows: list[Mapping[str, Any]], columns: list[str]) -> str:
    """The rows as aligned text, for the end of a run."""
    cells = [columns, *([cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )


def cell(value: Any) -> str:
    """What a table shows of a value: four digits of a float, nothing of None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
