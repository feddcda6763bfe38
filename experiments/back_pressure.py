"""What keeps prefill from running ahead of decode: a burst of prompts, of which decode holds few.

    python -m experiments.back_pressure [--model Qwen3-0.6B] [--device cuda] [--requests 128]

Two-GPU PD over --requests prompts that are all there at once, decode blocks for --held of them with
their whole outputs, and as many prefill blocks. `bounded` is the engine's own way: prompts are
computed with a promise of decode blocks for their outputs, at most --backlog of them ahead of
decode. `unbounded` takes as many ahead as there are requests, and promises outputs nothing.

peak_backlog: the most prompts that ever held blocks and did not decode. num_preemptions: requests
that lost their decode blocks to others, and were computed anew. computed: prefill tokens over those
of the prompts, 1 where none was. Counts, which hold on any device; seconds are of this one. A row
for each goes to experiments/results/back_pressure.csv.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine import LLM, SamplingParams
from experiments.engine_sets import engine_options
from experiments.harness import RESULTS, append_row, environment, table
from experiments.shapes import SHAPES, write_config
from experiments.workloads import at_once

BLOCK_SIZE = 16
BOUNDED, UNBOUNDED = "bounded", "unbounded"


@dataclass(frozen=True, kw_only=True)
class Pressure:
    """One engine that served the burst; with the stamp of the run, a row of back_pressure.csv."""

    model: str
    num_layers: int
    config: str  # bounded | unbounded
    num_requests: int
    prompt_len: int
    output_len: int
    num_kv_blocks: int  # of decode's pool
    max_decode_backlog: int
    growth_tokens: int
    peak_backlog: int
    num_preemptions: int
    computed: float
    seconds: float


def measure(args: argparse.Namespace, folder: Path, config: str) -> Pressure:
    """Serve the burst once. RuntimeError where a request did not come to its end."""
    burst = at_once(args.requests, args.prompt, args.output)
    num_blocks = args.held * -(-(args.prompt + args.output) // BLOCK_SIZE)
    bounds = {"max_decode_backlog": args.backlog, "pd_growth_tokens": args.output}
    if config == UNBOUNDED:
        bounds = {"max_decode_backlog": args.requests, "pd_growth_tokens": 0}
    options: dict[str, Any] = {"load_format": "dummy", "block_size": BLOCK_SIZE} | bounds
    options |= {"num_kv_blocks": num_blocks, "prefill_kv_fraction": 1.0}
    options |= {"max_num_seqs": args.requests}  # bound by blocks alone
    options |= {"max_model_len": args.prompt + args.output, "enable_prefix_caching": False}
    params = SamplingParams(temperature=0.0, max_tokens=args.output, ignore_eos=True)
    with LLM(folder, **engine_options("pd", args.device)[0], **options) as llm:
        start = time.perf_counter()
        outputs = llm.generate(burst.prompts, params)
        seconds, stats = time.perf_counter() - start, llm.stats()
    if num_short := sum(len(output["token_ids"]) != args.output for output in outputs):
        raise RuntimeError(f"{num_short} of {len(outputs)} requests ended early")
    return Pressure(
        model=args.model,
        num_layers=args.layers or SHAPES[args.model]["num_hidden_layers"],
        config=config,
        num_requests=args.requests,
        prompt_len=args.prompt,
        output_len=args.output,
        num_kv_blocks=num_blocks,
        max_decode_backlog=bounds["max_decode_backlog"],
        growth_tokens=bounds["pd_growth_tokens"],
        peak_backlog=stats["handoff"]["peak_backlog"],
        num_preemptions=stats["num_preemptions"],
        computed=stats["num_prefill_tokens"] / (args.requests * args.prompt),
        seconds=seconds,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Serve it both ways, append the rows, print them."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--model", choices=SHAPES, default="Qwen3-0.6B")
    p.add_argument("--layers", type=int, help="layers of it to run (default: all)")
    p.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    p.add_argument("--requests", type=int, default=128)
    p.add_argument("--prompt", type=int, default=256, help="tokens of each")
    p.add_argument("--output", type=int, default=256, help="tokens of each")
    p.add_argument("--held", type=int, default=16, help="requests that decode has blocks for")
    p.add_argument("--backlog", type=int, default=8, help="max_decode_backlog of bounded")
    p.add_argument("--out", type=Path, default=RESULTS / "back_pressure.csv")
    args = p.parse_args(argv)
    stamp, rows = environment(args.device), []
    with tempfile.TemporaryDirectory() as root:
        changes = {"num_hidden_layers": args.layers} if args.layers else {}
        folder = write_config(args.model, Path(root) / args.model, **changes)
        for config in (BOUNDED, UNBOUNDED):
            rows.append(asdict(measure(args, folder, config)))
            append_row(args.out, rows[-1] | stamp)
    print(table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
