"""python -m engine "prompt": complete prompts from the command line, text streamed as it comes."""

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from engine.config import DTYPES, OneDeviceWarning
from engine.llm import LLM
from engine.request import SamplingParams

CLI_MAX_NUM_SEQS = 8  # few graphs to capture: prompts are shown one after the other anyway
CLI_MAX_BATCHED_TOKENS = 2048
CLI_PIPELINE_MIN_REQUESTS = 2  # one for each micro-batch: whoever asks for static wants to see it
TWO_GPU = {"auto": "auto", "on": True, "off": False}


def parser() -> argparse.ArgumentParser:
    """The command line. Options left out keep the defaults of LLM and SamplingParams."""
    p = argparse.ArgumentParser(prog="python -m engine", description=__doc__)
    p.add_argument("prompts", nargs="+", metavar="prompt")
    p.add_argument("--model", default="smollm2", help="smollm2, a checkpoint folder or a hub name")
    p.add_argument("--chat", action="store_true", help="put each prompt into the chat template")
    p.add_argument("--json", action="store_true", help="print results with their metrics as JSON")
    engine = p.add_argument_group("engine")
    engine.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    engine.add_argument(
        "--two-gpu",
        choices=TWO_GPU,
        help="prefill on one GPU, decode on another; without this: where there are two",
    )
    engine.add_argument("--dtype", choices=["auto", *DTYPES])
    engine.add_argument("--kernels", choices=["auto", "triton", "reference"])
    engine.add_argument("--load-format", choices=["auto", "dummy"])
    engine.add_argument("--max-model-len", type=int, metavar="N")
    engine.add_argument("--num-kv-blocks", type=int, metavar="N")
    engine.add_argument(
        "--max-num-seqs",
        type=int,
        metavar="N",
        help=f"requests at a time, which prompts are with --json; without this: {CLI_MAX_NUM_SEQS}",
    )
    engine.add_argument("--gpu-memory-utilization", type=float, metavar="F")
    engine.add_argument("--enforce-eager", action="store_true", default=None)
    engine.add_argument(
        "--decode-pipeline",
        choices=["auto", "static", "disabled"],
        help="attention and FFN of decode on SMs of their own; auto: where that is faster, in "
        "steps of some 400 requests and more; static: of two or more, as --json has them",
    )
    engine.add_argument("--decode-attention-sm", type=int, metavar="N", help="SMs for attention")
    engine.add_argument("--decode-ffn-sm", type=int, metavar="N", help="SMs for FFN")
    engine.add_argument("--disable-green", action="store_true", default=None)
    sampling = p.add_argument_group("sampling")
    sampling.add_argument("--max-tokens", type=int, metavar="N")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0: greedy")
    sampling.add_argument("--top-k", type=int, metavar="K")
    sampling.add_argument("--top-p", type=float, metavar="P")
    sampling.add_argument("--min-p", type=float, metavar="P")
    sampling.add_argument("--seed", type=int, metavar="N")
    sampling.add_argument("--stop", action="append", metavar="TEXT")
    sampling.add_argument("--ignore-eos", action="store_true", default=None)
    return p


def _given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _sampling_params(args: argparse.Namespace) -> SamplingParams:
    names = ["max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "ignore_eos"]
    return SamplingParams(**_given(args, names))


def _engine_options(args: argparse.Namespace) -> dict[str, Any]:
    names = [
        "device",
        "dtype",
        "kernels",
        "load_format",
        "max_model_len",
        "num_kv_blocks",
        "max_num_seqs",
        "gpu_memory_utilization",
        "enforce_eager",
        "decode_pipeline",
        "decode_attention_sm",
        "decode_ffn_sm",
        "disable_green",
    ]
    sizes = {
        "max_num_seqs": CLI_MAX_NUM_SEQS,
        "max_num_batched_tokens": CLI_MAX_BATCHED_TOKENS,
    }
    if args.decode_pipeline == "static":
        sizes["decode_pipeline_min_requests"] = CLI_PIPELINE_MIN_REQUESTS
    return sizes | {"enable_two_gpu_pd": TWO_GPU[args.two_gpu or "auto"]} | _given(args, names)


def _warn_of_serial_decode(args: argparse.Namespace) -> None:
    if args.decode_pipeline == "static" and (len(args.prompts) < 2 or not args.json):
        warnings.warn(
            "decode is serial, not pipelined: prompts run one at a time; two or more with --json "
            "run together",
            stacklevel=2,
        )


def _stream(llm: LLM, prompts: Sequence[Any], args: argparse.Namespace) -> None:
    params = _sampling_params(args)
    for text, prompt in zip(args.prompts, prompts, strict=True):
        if len(prompts) > 1:
            print(f">>> {text}")
        for piece in llm.stream(prompt, params):
            print(piece, end="", flush=True)
        print(flush=True)


def _print_json(llm: LLM, prompts: Sequence[Any], args: argparse.Namespace) -> None:
    outputs = llm.generate(prompts, _sampling_params(args), use_tqdm=True)
    fields = ("text", "token_ids", "finish_reason", "metrics")
    results = [
        {"prompt": text} | {field: output[field] for field in fields}
        for text, output in zip(args.prompts, outputs, strict=True)
    ]
    print(json.dumps(results, ensure_ascii=False, indent=2))


@contextmanager
def _warnings_in_a_line(args: argparse.Namespace) -> Iterator[None]:
    """That there is one device is worth telling only where somebody has asked for two."""
    with warnings.catch_warnings():
        if args.two_gpu is None:
            warnings.simplefilter("ignore", OneDeviceWarning)
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = parser().parse_args(argv)
    try:
        _sampling_params(args)
        with _warnings_in_a_line(args):
            _warn_of_serial_decode(args)
            with LLM(args.model, **_engine_options(args)) as llm:
                prompts = [llm.chat_prompt(p) for p in args.prompts] if args.chat else args.prompts
                show = _print_json if args.json else _stream
                show(llm, prompts, args)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read it has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush
        return 128 + signal.SIGPIPE
    return 0


if __name__ == "__main__":
    sys.exit(main())
