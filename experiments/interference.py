"""What prefill costs decode: inter-token latency with prefill idle and with prefill flat out.

    python -m experiments.interference [--model Qwen3-0.6B Qwen3-8B] [--config pd]

A batch of 64 requests of 256 tokens decodes 1024 tokens each; ITL is taken over the same tokens of
each (from the 65th on) without and with a stream of 2048-token prompts of max_tokens=1, which never
decode: some are always waiting, and one at most is added between two steps. Rounds alternate. Token
times are taken where `step` returns, in the process that drives the engine. The stream alone says
how much of its own rate prefill kept. A row for each reading goes to
experiments/results/interference.csv.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine import LLM, SamplingParams
from experiments.engine_sets import engine_options
from experiments.harness import RESULTS, append_row, environment
from experiments.serving import percentiles
from experiments.shapes import add_model_argument, checkpoint
from experiments.workloads import at_once

AIMS = {"itl_ms_p99": 1.10, "itl_ms_mean": 1.05}  # at most: prefill flat out over prefill idle


@dataclass(frozen=True)
class Sizes:
    """The decode batch, and the prompts beside it."""

    num_requests: int = 64
    context: int = 256
    output_len: int = 1024
    first_token: int = 64  # of those measured; prompts come from half of that on
    prompt_len: int = 2048
    num_queued: int = 32  # prompts that are in the engine at any time
    alone_seconds: float = 2.0


@dataclass
class Stream:
    """Prompts that end with their first token, a new one for each that has ended."""

    llm: LLM
    sizes: Sizes
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=1))
    pending: set[int] = field(default_factory=set)
    num_done: int = 0

    def __post_init__(self) -> None:
        self._prompt = at_once(1, self.sizes.prompt_len, 1).prompts[0]

    def fill(self) -> None:
        """Add prompts until num_queued are there."""
        while len(self.pending) < self.sizes.num_queued:
            self.refill()

    def refill(self) -> None:
        """Add a prompt where fewer are there. Not all that ended in one launch at once, which
        would keep tokens waiting here: clients are not in step either."""
        if len(self.pending) < self.sizes.num_queued:
            self.pending.add(self.llm.add_request(self._prompt, self.params))

    def take(self, output: dict[str, Any]) -> None:
        """Count a prompt that has ended."""
        self.pending.remove(output["request_id"])
        self.num_done += 1

    def end(self) -> None:
        """Abort what is left of it; the engine is idle afterwards."""
        for request_id in self.pending:
            self.llm.abort(request_id)
        while not self.llm.is_finished():
            self.llm.step()


def decode_beside(llm: LLM, sizes: Sizes, *, is_busy: bool) -> dict[str, float | None]:
    """ITL of the decode batch, and the prompt tokens per second beside it. The engine is idle
    before and after."""
    batch = at_once(sizes.num_requests, sizes.context, sizes.output_len)
    times: dict[int, list[float]] = {
        llm.add_request(prompt, params): []
        for prompt, params in zip(batch.prompts, batch.params, strict=True)
    }
    stream = Stream(llm, sizes)
    start, num_before = 0.0, 0
    while (num_tokens := min(map(len, times.values()))) < sizes.output_len:
        if is_busy and num_tokens >= sizes.first_token // 2:
            (stream.refill if stream.pending else stream.fill)()
        outputs = llm.step()
        now = time.perf_counter()
        for output in outputs:
            if output["request_id"] in times:
                times[output["request_id"]].extend([now] * len(output["new_token_ids"]))
            elif output["finished"]:
                stream.take(output)
        if not start and min(map(len, times.values())) >= sizes.first_token:
            start, num_before = now, stream.num_done
    num_prompts = stream.num_done - num_before
    rate = num_prompts * sizes.prompt_len / (now - start)
    stream.end()
    gaps = (b - a for t in times.values() for a, b in pairwise(t[sizes.first_token - 1 :]))
    itl = percentiles("itl_ms", (gap * 1e3 for gap in gaps))
    return itl | {"prefill_tok_s": round(rate, 1)}


def prefill_alone(llm: LLM, sizes: Sizes) -> dict[str, float | None]:
    """Prompt tokens per second of the stream without a decode batch."""
    stream = Stream(llm, sizes)
    stream.fill()
    while not stream.num_done:
        _take_all(stream)
    start, num_before = time.perf_counter(), stream.num_done
    while (seconds := time.perf_counter() - start) < sizes.alone_seconds:
        _take_all(stream)
    rate = (stream.num_done - num_before) * sizes.prompt_len / seconds
    stream.end()
    return percentiles("itl_ms", ()) | {"prefill_tok_s": round(rate, 1)}


def _take_all(stream: Stream) -> None:
    for output in stream.llm.step():
        stream.take(output)
    stream.fill()


def measure(llm: LLM, sizes: Sizes, rounds: int) -> Iterator[dict[str, Any]]:
    """Readings in turn: prefill alone, then decode beside idle and busy prefill."""
    # what is compiled at first use, without all the tokens
    decode_beside(llm, replace(sizes, output_len=2 * sizes.first_token), is_busy=True)
    counts = {"requests": sizes.num_requests, "context": sizes.context}
    counts |= {"output_len": sizes.output_len, "prompt_len": sizes.prompt_len}
    yield {"prefill": "alone"} | counts | prefill_alone(llm, sizes)
    for _ in range(rounds):
        for is_busy in (False, True):
            reading = decode_beside(llm, sizes, is_busy=is_busy)
            yield {"prefill": "busy" if is_busy else "idle"} | counts | reading


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Ratios of the medians over the rounds beside their aims."""
    medians = {
        prefill: {
            name: statistics.median(row[name] for row in rows if row["prefill"] == prefill)
            for name in names
        }
        for prefill, names in {
            "alone": ["prefill_tok_s"],
            "busy": ["prefill_tok_s", *AIMS],
            "idle": [*AIMS],
        }.items()
    }
    busy, idle = medians["busy"], medians["idle"]
    parts = [
        f"{name} {idle[name]:.3f} -> {busy[name]:.3f} ({busy[name] / idle[name]:.3f}x, "
        f"aim {aim:.2f}x: {'holds' if busy[name] <= aim * idle[name] else 'missed'})"
        for name, aim in AIMS.items()
    ]
    rate, alone = busy["prefill_tok_s"], medians["alone"]["prefill_tok_s"]
    share = f"prefill {rate:.0f} tok/s, {rate / alone:.0%} of {alone:.0f} alone"
    return f"{rows[0]['model']} {rows[0]['config']}: {'; '.join(parts)}; {share}"


def main(argv: Sequence[str] | None = None, sizes: Sizes = Sizes()) -> None:
    """Measure each model, append the rows, print the ratios."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_model_argument(p)
    p.add_argument("--config", default="pd", choices=["one", "pd"])
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--out", type=Path, default=RESULTS / "interference.csv")
    args = p.parse_args(argv)
    [options] = engine_options(args.config, args.device)
    options |= {"load_format": "dummy", "enable_prefix_caching": False, "max_model_len": 4608}
    options |= {"max_num_batched_tokens": 16384}
    stamp = environment(options["device"])
    for model in args.model:
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            source = checkpoint(model, Path(folder))
            with LLM(source, **options) as llm:
                for reading in measure(llm, sizes, args.rounds):
                    row = {"model": source.name, "config": args.config} | reading | stamp
                    append_row(args.out, row)
                    rows.append(row)
        print(summary(rows), flush=True)


if __name__ == "__main__":
    gc.freeze()  # what is imported stays: to go through it takes as long as ten steps
    main()
