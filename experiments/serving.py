"""A workload through one LLM, and what its users saw of it: latencies, goodput."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from engine import LLM
from experiments.workloads import Workload

TTFT_LIMIT_MS = 500.0  # what a request must keep to count for goodput: its first token,
TPOT_LIMIT_MS = 20.0  # and the mean time of each later one


@dataclass(frozen=True)
class Served:
    """One request that ran to its end."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    ttft_ms: float
    tpot_ms: float | None  # None: it had one token
    itl_ms: tuple[float, ...] = ()  # between its tokens; of arrivals alone

    @classmethod
    def of(cls, metrics: dict[str, Any], **changes: Any) -> "Served":
        """From the metrics of the engine, less what was measured here."""
        fields = {
            "num_prompt_tokens": metrics["num_prompt_tokens"],
            "num_output_tokens": metrics["num_generated_tokens"],
            "num_cached_tokens": metrics["num_cached_tokens"],
            "num_preemptions": metrics["num_preemptions"],
            "ttft_ms": metrics["ttft_ms"],
            "tpot_ms": metrics["tpot_ms"],
        }
        return cls(**fields | changes)

    @property
    def is_good(self) -> bool:
        """Whether it counts for goodput."""
        return self.ttft_ms <= TTFT_LIMIT_MS and (self.tpot_ms or 0.0) <= TPOT_LIMIT_MS


def serve(llm: LLM, workload: Workload, start: float) -> list[Served]:
    """Run every request to its end. start: time.perf_counter() at which the workload begins.

    All at once: one `generate`, times by the engine's clock. Arrivals: by `add_request` and `step`;
    a token's time is when `step` returned it, and the first counts from when the request was due.
    """
    if workload.arrivals is None:
        outputs = llm.generate(workload.prompts, workload.params)
        return [Served.of(output["metrics"]) for output in outputs]
    return _serve_arrivals(llm, workload, start)


def _serve_arrivals(llm: LLM, workload: Workload, start: float) -> list[Served]:
    due = [start + seconds for seconds in workload.arrivals or ()]
    requests = list(zip(due, workload.prompts, workload.params, strict=True))[::-1]
    arrived: dict[int, float] = {}
    token_times: dict[int, list[float]] = {}
    served = []
    while requests or not llm.is_finished():
        while requests and requests[-1][0] <= time.perf_counter():
            arrival, prompt, params = requests.pop()
            request_id = llm.add_request(prompt, params)
            arrived[request_id], token_times[request_id] = arrival, []
        if llm.is_finished():
            sleep_until(requests[-1][0])
            continue
        outputs = llm.step()
        now = time.perf_counter()
        for output in outputs:
            request_id = output["request_id"]
            times = token_times[request_id]
            times.extend([now] * len(output["new_token_ids"]))
            if output["finished"]:
                served.append(_served(output["metrics"], arrived[request_id], times))
    return served


def _served(metrics: dict[str, Any], arrival: float, times: Sequence[float]) -> Served:
    itl_ms = tuple((b - a) * 1e3 for a, b in pairwise(times))
    tpot_ms = sum(itl_ms) / len(itl_ms) if itl_ms else None
    return Served.of(metrics, ttft_ms=(times[0] - arrival) * 1e3, tpot_ms=tpot_ms, itl_ms=itl_ms)


def sleep_until(moment: float) -> None:
    """Sleep to a time.perf_counter() moment, not at all where it has passed."""
    time.sleep(max(0.0, moment - time.perf_counter()))


def percentiles(name: str, values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean, p50 and p99 as columns; None where there is nothing to measure."""
    known = [value for value in values if value is not None]
    columns = [f"{name}_mean", f"{name}_p50", f"{name}_p99"]
    if not known:
        return dict.fromkeys(columns)
    found = [np.mean(known), *np.percentile(known, [50, 99])]
    return {column: round(float(x), 4) for column, x in zip(columns, found, strict=True)}


def figures(workload: Workload, served: Sequence[Served], seconds: float) -> dict[str, Any]:
    """Counts, rates and latencies of one reading. AssertionError where it is no measurement:
    a prompt came from the prefix cache, a request was lost or ended early."""
    assert not any(s.num_cached_tokens for s in served), "a prompt was in the prefix cache"
    num_output_tokens = sum(s.num_output_tokens for s in served)
    assert len(served) == len(workload.prompts), "a request was lost"
    assert num_output_tokens == sum(workload.output_lens), "a request ended early"
    num_good = sum(s.is_good for s in served)
    return {
        "requests": len(served),
        "prompt_tokens": sum(s.num_prompt_tokens for s in served),
        "output_tokens": num_output_tokens,
        "seconds": round(seconds, 4),
        "output_tok_s": round(num_output_tokens / seconds, 1),
        **percentiles("ttft_ms", (s.ttft_ms for s in served)),
        **percentiles("tpot_ms", (s.tpot_ms for s in served)),
        **percentiles("itl_ms", (ms for s in served for ms in s.itl_ms)),
        "goodput_req_s": None if workload.arrivals is None else round(num_good / seconds, 3),
        "preemptions": sum(s.num_preemptions for s in served),
    }
