"""Configurations of the engine, and the processes that serve those of one model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.replicas import Replicas
from experiments.serving import figures
from experiments.workloads import CLOSED, Workload

READ_SECONDS = 2.0  # some workloads last less than half a second: one reading says little
MAX_READINGS = 8
PD = {"enable_two_gpu_pd": True, "prefill_device_id": 0, "decode_device_id": 1}
# options of one engine over both devices, by configuration
ON_BOTH = {"pd": PD, "pd_pipeline": {**PD, "enable_decode_pipeline": True}}
CONFIGS = ("one", "replicas", *ON_BOTH)  # in the order of a run: pd takes the rates of replicas

Reading = dict[str, Any]  # columns of engine.csv


def engine_options(config: str, device: str) -> list[dict[str, Any]]:
    """Options of each engine's LLM, those apart that all have. device: cpu, or cuda for the GPUs 0
    and 1."""
    if config in ON_BOTH:
        return [{"device": device} | ON_BOTH[config]]
    num_engines = {"one": 1, "replicas": 2}[config]
    return [{"device": "cpu" if device == "cpu" else f"cuda:{i}"} for i in range(num_engines)]


class EngineSet:
    """Engines over one model, and the configurations that they serve."""

    def __init__(
        self, folder: Path, configs: Sequence[str], engines: Sequence[dict[str, Any]]
    ) -> None:
        """folder: of the checkpoint; configs: that of the engines, and "one" where the first of
        them alone is another one; engines: the options of each."""
        self.model = folder.name
        self.configs = configs
        self.replicas = Replicas(folder, engines)
        self._num_engines = len(engines)
        self._common = {
            "model": self.model,
            "max_num_seqs": engines[0]["max_num_seqs"],
            "eager": engines[0]["enforce_eager"],
        }

    def rehearse(self, workload: Workload) -> None:
        """Have compiled what this workload is the first to need, before a clock starts: each engine
        rehearses all that one alone would."""
        self.replicas.run(workload.rehearsal().for_each(self._num_engines))

    def read(self, config: str, name: str, workload: Workload) -> Reading:
        """Serve it once. RuntimeError, AssertionError: see `Replicas`, `figures`."""
        served, seconds = self.replicas.run(workload, 1 if config == "one" else None)
        what = {"workload": name, "config": config, "gpus": 1 if config == "one" else 2}
        return self._common | what | figures(workload, served, seconds)

    def read_closed(
        self, configs: Sequence[str], name: str, num_readings: int
    ) -> dict[str, list[Reading]]:
        """Readings of one of CLOSED by configuration, which take turns, so that what the machine
        does meanwhile falls on all: of each so many at least, and more until READ_SECONDS are
        measured, of which there are MAX_READINGS at most."""
        workload = CLOSED[name]()
        readings: dict[str, list[Reading]] = {config: [] for config in configs}

        def wants_more(config: str) -> bool:
            read = readings[config]
            is_short = sum(r["seconds"] for r in read) < READ_SECONDS
            return len(read) < num_readings or (is_short and len(read) < MAX_READINGS)

        while wanting := [config for config in configs if wants_more(config)]:
            for config in wanting:
                readings[config].append(self.read(config, name, workload))
        return readings


def engine_sets(
    folder: Path,
    configs: Sequence[str],
    options: Mapping[str, Any],
    *,
    device: str,
) -> list[EngineSet]:
    """Sets for these configurations, in the order of a run; all processes are started, none is on a
    device yet. options: of every engine; device: see `engine_options`."""
    mixed = [config for config in ("one", "replicas") if config in configs]
    together = [mixed] * bool(mixed) + [[config] for config in ON_BOTH if config in configs]
    return [
        EngineSet(
            folder, served, [{**options, **own} for own in engine_options(served[-1], device)]
        )
        for served in together
    ]
