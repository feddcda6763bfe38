"""Engines in processes of their own, which begin each workload at the same instant.

One engine on one device, several mixed replicas, one engine over two devices: all are measured
alike, and none shares an interpreter, a device's memory pool or a start-up with another.
"""

import multiprocessing
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from engine import LLM, SamplingParams
from experiments.harness import environment
from experiments.serving import Served, serve, sleep_until
from experiments.workloads import Workload

LEAD_SECONDS = 0.05  # between the word to start and the start, so that all have heard it


class Replicas:
    """LLMs over one checkpoint. Use it in a `with` statement."""

    def __init__(self, folder: Path, options: Sequence[dict[str, Any]]) -> None:
        """options: of each LLM. Returns when weights are loaded, graphs captured and a first
        prompt answered everywhere. RuntimeError, with the cause, where one fails, then or later."""
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._connections: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        try:
            for own_options in options:
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, folder, own_options))
                process.start()
                theirs.close()  # or the end of the process would not be seen
                self._connections.append(ours)
                self._processes.append(process)
            self.environment: dict[str, str] = self._receive()[0]
        except BaseException:
            self._kill()
            raise

    def __enter__(self) -> "Replicas":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            for connection in self._connections:
                connection.send(None)
            for process in self._processes:
                process.join(timeout=60)
        self._kill()

    def run(self, workload: Workload) -> tuple[list[Served], float]:
        """Deal the requests out in turn and serve them.

        Returns what became of each, and the seconds from the common start to the end of the last.
        """
        num_replicas = len(self._connections)
        for index, connection in enumerate(self._connections):
            connection.send(workload.part(index, num_replicas))
        self._receive()  # all have taken their part and wait: the barrier
        start = time.perf_counter() + LEAD_SECONDS  # one clock for all processes of a machine
        for connection in self._connections:
            connection.send(start)
        results = self._receive()
        served = [request for part, _ in results for request in part]
        return served, max(end for _, end in results) - start

    def _receive(self) -> list[Any]:
        """One answer of each; all are killed where one fails, for the others wait for it."""
        answers = []
        for index, connection in enumerate(self._connections):
            try:
                answer, failure = connection.recv()
            except (EOFError, ConnectionResetError):
                self._processes[index].join(timeout=10)
                answer, failure = None, f"exit code {self._processes[index].exitcode}"
            if failure is not None:
                self._kill()
                raise RuntimeError(f"engine {index} ended: {failure}")
            answers.append(answer)
        return answers

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []


def _work(connection: Connection, folder: Path, options: dict[str, Any]) -> None:
    """The process of one engine. Answers are (answer, None) or (None, why it failed)."""
    try:
        with LLM(folder, **options) as llm:
            llm.generate([[1] * 300] * 4, SamplingParams(max_tokens=8, ignore_eos=True))
            connection.send((environment(options["device"]), None))
            while (workload := connection.recv()) is not None:
                connection.send((None, None))
                start = connection.recv()
                sleep_until(start)
                served = serve(llm, workload, start)
                connection.send(((served, time.perf_counter()), None))
    except EOFError:  # the one who asks is gone
        pass
    except Exception:
        connection.send((None, traceback.format_exc()))
