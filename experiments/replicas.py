"""Engines in processes of their own, which begin each workload at the same instant.

One engine on one device, several mixed replicas, one engine over two devices: all are measured
alike, and none shares an interpreter, a device's memory pool or a start-up with another.
"""

import gc
import multiprocessing
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine import LLM, SamplingParams
from experiments.harness import environment
from experiments.serving import Served, serve, sleep_until
from experiments.workloads import Workload

LEAD_SECONDS = 0.02  # between the word to start and the start, so that all have heard it


class Replicas:
    """LLMs over one checkpoint, on their devices within a `with` statement alone."""

    def __init__(self, folder: Path, options: Sequence[dict[str, Any]]) -> None:
        """options: of each LLM. Starts the processes; they import what they need, which takes
        seconds, and touch no device yet, so that this may be done while others are measured."""
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.environment: dict[str, str] = {}  # the first engine's, once it is loaded
        self._connections: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        for own_options in options:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, folder, own_options), daemon=True)
            process.start()
            theirs.close()  # or the end of the process would not be seen
            self._connections.append(ours)
            self._processes.append(process)

    def __enter__(self) -> "Replicas":
        """Returns when weights are loaded, graphs captured and a first prompt answered everywhere.
        RuntimeError, with the cause, where one fails, here or later."""
        try:
            self._send(["load"] * len(self._connections))
            self.environment = self._receive()[0]
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """RuntimeError where an engine cannot end as it should, say with blocks still held."""
        if kind is None:
            self._send([None] * len(self._connections))
            self._receive()
        self._kill()  # they have nothing left to do but to unload libraries, for a second or two

    def run(self, workload: Workload, num_engines: int | None = None) -> tuple[list[Served], float]:
        """Deal the requests out in turn, to all engines or the first num_engines, and serve them.

        Returns what became of each, and the seconds from the common start to the end of the last.
        """
        num_parts = len(self._connections[:num_engines])
        self._send([workload.part(index, num_parts) for index in range(num_parts)])
        self._receive(num_parts)  # all have taken their part and wait: the barrier
        start = time.perf_counter() + LEAD_SECONDS  # one clock for all processes of a machine
        self._send([start] * num_parts)
        results = self._receive(num_parts)
        served = [request for part, _ in results for request in part]
        return served, max(end for _, end in results) - start

    def _send(self, messages: Sequence[Any]) -> None:
        """One message to each engine, to the first ones where there are fewer."""
        for connection, message in zip(self._connections, messages, strict=False):
            with suppress(OSError):  # one that has ended is noticed, with its cause, by `_receive`
                connection.send(message)

    def _receive(self, num_engines: int | None = None) -> list[Any]:
        """One answer of each; all are killed where one fails, for the others wait for it."""
        answers = []
        for index, connection in enumerate(self._connections[:num_engines]):
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
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []


def _work(connection: Connection, folder: Path, options: dict[str, Any]) -> None:
    """The process of one engine. Answers are (answer, None) or (None, why it failed)."""
    tqdm.set_lock(threading.RLock())  # one between processes is called leaked where one is killed
    try:
        connection.recv()
        with LLM(folder, **options) as llm:
            llm.generate([[1] * 300] * 4, SamplingParams(max_tokens=8, ignore_eos=True))
            # what is there by now stays: to go through it takes some 50 ms, of any one workload
            gc.freeze()
            connection.send((environment(options["device"]), None))
            while (workload := connection.recv()) is not None:
                # params are made here, before the clock starts
                connection.send((len(workload.params), None))
                start = connection.recv()
                sleep_until(start)
                served = serve(llm, workload, start)
                connection.send(((served, time.perf_counter()), None))
        connection.send((None, None))
    except EOFError:  # the one who asks is gone
        pass
    except Exception:
        connection.send((None, traceback.format_exc()))
