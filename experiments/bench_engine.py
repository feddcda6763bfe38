"""Output tokens per second of the whole engine, dummy weights, token-id prompts.

    python -m experiments.bench_engine --model Qwen3-0.6B --workload offline batch1 fixed

Workloads: `offline`, seed 0, 256 requests of random token ids (0..10000), prompt and output lengths
uniform in 100..1024; `batch1`, one request of 128 + 256 tokens; `fixed`, 256 x (512 + 128). One
generate() call is timed after a warm-up call; a row goes to experiments/results/engine.csv.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import LLM, SamplingParams
from experiments.harness import RESULTS, append_row, environment, table
from experiments.shapes import SHAPES, write_config

MAX_TOKEN_ID = 10_000


@dataclass(frozen=True)
class Workload:
    """Prompts, and how many tokens each is to be given."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def params(self) -> list[SamplingParams]:
        """Temperature 0.6; every request runs to its full length."""
        return [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in self.output_lens
        ]


def _random_prompts(lens: Sequence[int], rng: random.Random) -> list[list[int]]:
    return [[rng.randint(0, MAX_TOKEN_ID) for _ in range(n)] for n in lens]


def offline() -> Workload:
    """256 requests, 100-1024 prompt tokens each, then as many output tokens."""
    rng = random.Random(0)
    prompts = _random_prompts([rng.randint(100, 1024) for _ in range(256)], rng)
    return Workload(prompts, [rng.randint(100, 1024) for _ in range(256)])


def batch1() -> Workload:
    """One request of 128 + 256 tokens."""
    return Workload(_random_prompts([128], random.Random(0)), [256])


def fixed() -> Workload:
    """256 requests of 512 + 128 tokens."""
    return Workload(_random_prompts([512] * 256, random.Random(0)), [128] * 256)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "offline": offline,
    "batch1": batch1,
    "fixed": fixed,
}


def measure(llm: LLM, workload: Workload) -> dict[str, Any]:
    """Time one generate() call; nothing of it is in the prefix cache."""
    start = time.perf_counter()
    outputs = llm.generate(workload.prompts, workload.params)
    seconds = time.perf_counter() - start
    metrics = [output["metrics"] for output in outputs]
    assert not any(m["num_cached_tokens"] for m in metrics), "a prompt was in the prefix cache"
    num_output_tokens = sum(m["num_generated_tokens"] for m in metrics)
    assert num_output_tokens == sum(workload.output_lens), "a request ended early"
    return {
        "requests": len(outputs),
        "prompt_tokens": sum(m["num_prompt_tokens"] for m in metrics),
        "output_tokens": num_output_tokens,
        "seconds": round(seconds, 4),
        "output_tok_s": round(num_output_tokens / seconds, 1),
        "ttft_ms_median": round(statistics.median(m["ttft_ms"] for m in metrics), 3),
        "tpot_ms_median": round(statistics.median(m["tpot_ms"] for m in metrics), 4),
        "preemptions": sum(m["num_preemptions"] for m in metrics),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each workload on each model; print a table and append to the CSV."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", nargs="+", default=["Qwen3-0.6B"], choices=SHAPES)
    p.add_argument("--workload", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    p.add_argument("--device", default="cuda:0")
    p.add_argument("--repeat", type=int, default=2, help="readings of each workload, all recorded")
    p.add_argument("--max-model-len", type=int, default=4096)
    p.add_argument("--enforce-eager", action="store_true")
    p.add_argument("--out", type=Path, default=RESULTS / "engine.csv")
    args = p.parse_args(argv)
    rows = []
    for model in args.model:
        rows += _measure_model(model, args)
    print(table(rows, ["model", "workload", "output_tok_s", "ttft_ms_median", "tpot_ms_median"]))


def _measure_model(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "device": args.device,
            "load_format": "dummy",
            "max_model_len": args.max_model_len,
            "enforce_eager": args.enforce_eager,
            "max_num_batched_tokens": 16384,
            "enable_prefix_caching": False,
        }
        with LLM(write_config(model, Path(folder)), **options) as llm:
            llm.generate([[1] * 300] * 4, SamplingParams(max_tokens=8, ignore_eos=True))
            for name in args.workload:
                workload = WORKLOADS[name]()
                for _ in range(args.repeat):
                    row = {"model": model, "workload": name, "eager": args.enforce_eager}
                    row |= measure(llm, workload) | environment(args.device)
                    append_row(args.out, row)
                    print(row, flush=True)
                    rows.append(row)
    torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    main()
