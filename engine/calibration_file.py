"""Times that a calibration found, kept between runs: one JSON file for each setting.

A setting is what the times depend on: GPU, model shape, dtype, versions, options, sources. What is
damaged, or is of another setting, counts as not there.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from engine.pipeline_choice import Readings
from engine.pipeline_stats import SERIAL

ROOT = Path(__file__).resolve().parent.parent
# what decides how long a step takes, how that is read, and which splits are read at all
SOURCES = ("kernels/*.py", "kernels/*.json", "models/decoder.py", "green/*.py")
SOURCES += ("engine/decode.py", "engine/graphs.py", "engine/kv_cache.py", "engine/micro_batches.py")
SOURCES += ("engine/pipeline.py", "engine/stage_*.py", "engine/auto_pipeline.py")
SOURCES += ("engine/trial_steps.py", "engine/pipeline_choice.py")
SOURCES += ("engine/step_model.py", "engine/device_rates.py")

logger = logging.getLogger(__name__)


def digest_of_sources(root: Path = ROOT) -> str:
    """Of the code that a step runs: times found with other code do not count."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in root.glob(pattern)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


# what a file of another form raises, wherever it is read
DAMAGED = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


class CalibrationFile:
    """The readings of one setting, by batch."""

    def __init__(self, folder: Path, setting: Mapping[str, Any]) -> None:
        self.setting = json.loads(json.dumps(setting))
        name = hashlib.sha256(json.dumps(self.setting, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{name[:16]}.json"

    def read(self) -> dict[int, Readings]:
        """What is kept; nothing, and a line of log, where that cannot be used."""
        try:
            content = json.loads(self.path.read_text())
            if (other := content["setting"]) != self.setting:
                names = sorted({*other, *self.setting})
                differ = [name for name in names if other.get(name) != self.setting.get(name)]
                raise ValueError(f"it must be of this setting, got another {', '.join(differ)}")
            return {int(batch): _checked(read) for batch, read in content["readings"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, *DAMAGED) as error:
            logger.warning("%s is ignored: %s: %s", self.path, type(error).__name__, error)
            return {}

    def write(self, readings: Mapping[int, Readings]) -> None:
        """Replace what is kept, in one move, but for what another engine has kept beside it
        meanwhile. Where that fails, a line of log: the next run times anew."""
        merged = {batch: dict(read) for batch, read in readings.items()}
        for batch, read in self.read().items():
            for context, ms in read.items():
                ours = merged.setdefault(batch, {})
                ours[context] = joined(ours.get(context, {}), ms)
        content = {"setting": self.setting, "readings": merged}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            options = {"dir": self.path.parent, "suffix": ".partial", "delete": False}
            with ExitStack() as on_error, NamedTemporaryFile("w", **options) as file:
                on_error.callback(Path(file.name).unlink, missing_ok=True)
                json.dump(content, file, indent=1)
                file.flush()
                os.replace(file.name, self.path)
                on_error.pop_all()
        except OSError as error:
            logger.warning("%s is not written: %s", self.path, error)


def joined(known: Mapping[str, float], new: Mapping[str, float]) -> dict[str, float]:
    """Known times, and new ones of other modes. Where serial is known, in proportion to it: clocks
    differ from start to start."""
    scale = known.get(SERIAL, new.get(SERIAL, 1.0)) / new.get(SERIAL, 1.0)
    return {**{mode: t * scale for mode, t in new.items()}, **known}


def _checked(readings: Any) -> dict[int, dict[str, float]]:
    checked = {int(context): dict(ms) for context, ms in readings.items()}
    for context, ms in checked.items():
        is_whole = all(type(t) in (int, float) and 0 < t < math.inf for t in ms.values())
        if context < 1 or not is_whole or (ms and SERIAL not in ms):
            raise ValueError(f"{context} tokens must have times by mode, got {ms}")
        checked[context] = {mode: float(t) for mode, t in ms.items()}
    return checked
