"""Every kernel on its shapes and numbers of SMs, beside its peers and the machine's own ceilings.

    python -m experiments.bench_kernels [--only decode_attention mlp] [--quick]

The ceilings are measured first, in the same run: a read-only stream, a copy, a matmul of 8192^3, a
copy to a peer GPU where there is one. Every launch is checked against kernels/reference.py before
it is timed. A row for each reading goes to experiments/results/kernels.csv.

What is swept over SMs is measured twice: "grid", where num_sms sizes the launcher's grid and the
hardware still chooses among all SMs, and "green", on a green context of that many, where peers may
stand beside it. sms_granted says on how many SMs a launch could run.
"""

import argparse
import gc
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from experiments.attention_cases import attention_cases
from experiments.ceilings import measure_ceilings
from experiments.copy_cases import copy_cases
from experiments.dense_cases import dense_cases
from experiments.harness import RESULTS, append_row, environment, table
from experiments.kernel_case import Case, Mismatch
from experiments.memory_cases import memory_cases
from experiments.places import Place, Places
from experiments.readings import BANDWIDTH, CEILING, Ceilings, Reading, best_peers
from experiments.timing import Effort, time_calls
from kernels.tile import device_sms

QUICK_SMS = (56, 64)
QUICK_EFFORT = Effort(graph_ms=2.0, reading_ms=20.0, min_replays=5)
TABLE = ("kernel", "shape", "SMs", "us", "rate", "% of ceiling", "x best peer", "best peer")


def all_cases() -> list[Case]:
    return attention_cases() + dense_cases() + memory_cases() + copy_cases()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, append each row to the CSV at once, print a table."""
    args = _parse(argv)
    device, dtype = args.device, dtype_on(args.device)
    effort = QUICK_EFFORT if args.quick else Effort()
    cases = [
        replace(case, dtype=dtype, sweep=_sweep(case, args))
        for case in all_cases()
        if (case.quick or not args.quick) and case.kernel in (args.only or BANDWIDTH)
    ]
    stamp, readings = environment(device), []
    seconds: Counter[str] = Counter()  # what makes a run long
    start = time.perf_counter()
    for reading in _measure_all(cases, device, dtype, effort):
        stamped = replace(reading, **stamp)
        append_row(args.out, asdict(stamped))
        readings.append(stamped)
        now = time.perf_counter()
        seconds[f"{reading.kernel} {reading.impl}"] += now - start
        start = now
    print(table(table_rows(readings), list(TABLE)))
    longest = ", ".join(f"{name} {s:.0f}" for name, s in seconds.most_common(12))
    print(f"{seconds.total():.0f} seconds, compilation and checks included; {longest}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--only", nargs="+", choices=BANDWIDTH, metavar="KERNEL", help=str([*BANDWIDTH]))
    p.add_argument("--num-sms", nargs="*", type=int, help="in place of each kernel's own")
    p.add_argument("--quick", action="store_true", help="fewer shapes and repeats: a minute")
    p.add_argument("--out", type=Path, default=RESULTS / "kernels.csv")
    p.add_argument("--device", default="cuda:0")
    args = p.parse_args(argv)
    args.device = current_device(p, args.device)
    if any(n < 1 for n in args.num_sms or ()):
        p.error(f"--num-sms must be positive, got {args.num_sms}")
    return args


def current_device(p: argparse.ArgumentParser, name: str) -> torch.device:
    """The device of that name, from now on the current one. One that kernels cannot run on is an
    error of the command line."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            p.error(f"--device must be a GPU of this machine, got {device} and no CUDA device")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    elif os.environ.get("TRITON_INTERPRET") != "1":
        p.error(
            f"--device {device} needs TRITON_INTERPRET=1: a rehearsal, without meaning as times"
        )
    return device


def dtype_on(device: torch.device) -> torch.dtype:
    """Of the cases: the interpreter gets bfloat16 wrong."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


def _sweep(case: Case, args: argparse.Namespace) -> tuple[int, ...]:
    """The SMs that a case is measured on besides the whole GPU."""
    if case.sweep and args.num_sms is not None:
        return tuple(args.num_sms)
    return tuple(n for n in case.sweep if n in QUICK_SMS or not args.quick)


def _measure_all(
    cases: Sequence[Case], device: torch.device, dtype: torch.dtype, effort: Effort
) -> Iterator[Reading]:
    nums_sms = sorted({n for case in cases for n in case.sweep})
    for reading in measure_ceilings(device, dtype, nums_sms, effort):
        _say(reading)
        yield reading
    with Places(device) as places:
        for case in cases:
            if not case.is_possible(device):
                print(f"skipped {case.kernel}: {case.shape}: not on this machine")
                continue
            there = places.of([n for n in case.sweep if n <= device_sms(device)])
            for reading in measure(case, device, there, effort):
                _say(reading)
                yield reading
            gc.collect()  # the buffers of a case lie in closures that know each other
            if device.type == "cuda":
                torch.cuda.empty_cache()


def measure(
    case: Case, device: torch.device, places: Sequence[Place], effort: Effort
) -> Iterator[Reading]:
    """Check and time ours and every peer that takes the shape, on buffers made here.

    Ours runs on the whole GPU and at every place; the peers on the whole GPU, and on the green
    contexts where the case has them there.
    """
    problem = case.build(device, case.copies)
    peer_places = [place for place in places if place.partitioning == "green" and case.sweeps_peers]
    for impl in problem.impls(places, peer_places):
        place = impl.place
        how = {"captured": impl.captured, "stream": place.stream}
        try:
            problem.check(impl)
            times = time_calls(impl.run, case.copies, device, effort, **how)
        except Mismatch as error:
            raise Mismatch(f"{case.kernel} {case.shape}: {error}") from error
        except Exception as error:
            if impl.name == "ours":
                raise
            print(f"skipped {impl.name}{place.text}: {case.shape}: {_first_line(error)}")
            continue
        yield Reading(
            kernel=case.kernel,
            impl=impl.name,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            partitioning=place.partitioning,
            sms_asked=place.sms_asked,
            sms_granted=place.num_sms if place.stream is not None else device_sms(device),
            ms_p20=times.p20,
            ms_p50=times.p50,
            ms_p80=times.p80,
            bytes=case.bytes,
            flops=case.flops,
        )


def table_rows(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    """Of the ceilings and of ours: the time, the rate that counts, and how the peers stand."""
    ceilings, peers = Ceilings.of(readings), best_peers(readings)
    rows = []
    for r in readings:
        if r.kernel != CEILING and r.impl != "ours":
            continue
        row = {
            "kernel": r.impl if r.kernel == CEILING else r.kernel,
            "shape": r.shape,
            "SMs": "" if r.sms_asked is None else f"{r.sms_asked} {r.partitioning}",
            "us": f"{r.ms_p50 * 1e3:.1f}",
            "rate": f"{r.gb_s:.0f} GB/s",
            "% of ceiling": "",
            "x best peer": "",
            "best peer": "",
        }
        if r.kernel == CEILING:
            is_matmul = r.flops > 0
        else:
            is_matmul = ceilings.is_compute_bound(r)
            row["% of ceiling"] = f"{ceilings.percent(r):.1f}"
            peer = peers.get(r.where)
            if peer is not None:
                row["x best peer"] = f"{peer.ms_p50 / r.ms_p50:.2f}"
                row["best peer"] = peer.impl
        if is_matmul:
            row["rate"] = f"{r.tflop_s:.0f} TFLOP/s"
        rows.append(row)
    return rows


def _say(r: Reading) -> None:
    sms = "" if r.sms_asked is None else f" on {r.sms_asked} SMs ({r.partitioning})"
    rate = f"{r.gb_s:.0f} GB/s" + f", {r.tflop_s:.0f} TFLOP/s" * bool(r.flops)
    print(f"{r.kernel}: {r.impl}{sms}: {r.shape}: {r.ms_p50 * 1e3:.1f} us, {rate}", flush=True)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


if __name__ == "__main__":
    main()
