"""One case of bench_kernels launched a few times, without graphs or clocks: for a profiler.

    ncu --clock-control none --set full -k regex:decode --profile-from-start off \\
        python -m experiments.launch_case decode_attention "B=64 context=4096" [--impl ours]
        [--num-sms 56] [--launches 5] [--device cuda:0]

The case is the one whose shape begins with these words. Its result is checked against
kernels/reference.py; only the launches behind that lie between cudaProfilerStart and
cudaProfilerStop. They go over the same copies of the buffers as in bench_kernels, so that L2 holds
nothing of them.
"""

import argparse
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

import kernels
from experiments.bench_kernels import all_cases, current_device, dtype_on
from experiments.kernel_case import Case, Impl, Problem
from experiments.places import Place
from experiments.readings import BANDWIDTH
from experiments.timing import Run


def main(argv: Sequence[str] | None = None) -> None:
    """Build, check, launch, say so in a line. An unknown case or impl ends it with status 2."""
    p = _parser()
    args = p.parse_args(argv)
    for name in ("launches", "num_sms"):
        if (value := getattr(args, name)) is not None and value < 1:
            p.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    device = current_device(p, args.device)
    case = replace(_case(p, args.kernel, args.shape), dtype=dtype_on(device))
    if not case.is_possible(device):
        p.error(f"{case.kernel} {case.shape} must have what this machine lacks")
    if args.num_sms is not None and (args.impl != "ours" or not _takes_num_sms(case)):
        p.error(f"--num-sms is for ours where the launcher takes it, got {args.impl} {case.kernel}")
    problem = case.build(device, case.copies)
    impl = _impl(p, problem, args.impl, args.num_sms)
    problem.check(impl)
    launch(impl.run, case.copies, args.launches, device)
    what = f"{case.kernel}: {impl.name}{impl.place.text}: {case.shape}"
    print(f"{what}: as the reference; launched {args.launches} times, {case.copies} copies in turn")


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("kernel", choices=BANDWIDTH, metavar="kernel", help=str([*BANDWIDTH]))
    p.add_argument("shape", help="the first words of it")
    p.add_argument("--impl", default="ours", help="or the name of a peer")
    p.add_argument("--num-sms", type=int, help="that the launcher is told of")
    p.add_argument("--launches", type=int, default=5)
    p.add_argument("--device", default="cuda:0")
    return p


def _case(p: argparse.ArgumentParser, kernel: str, words: str) -> Case:
    """The kernel's one case whose shape begins with these words; one that is no longer wins."""
    cases = {case.shape: case for case in all_cases() if case.kernel == kernel}
    found = [shape for shape in cases if f"{shape} ".startswith(f"{words} ")]
    if words in cases:
        found = [words]
    if len(found) != 1:
        shapes = "\n  ".join(found or cases)
        p.error(f"shape must be the first words of one of these, got {words!r}:\n  {shapes}")
    return cases[found[0]]


def _takes_num_sms(case: Case) -> bool:
    launcher = getattr(kernels, case.kernel.partition(" ")[0])
    return "num_sms" in inspect.signature(launcher).parameters


def _impl(p: argparse.ArgumentParser, problem: Problem, name: str, num_sms: int | None) -> Impl:
    """Ours, told of so many SMs if any, or a peer."""
    places = [] if num_sms is None else [Place("grid", num_sms, num_sms)]
    impls = {impl.name: impl for impl in problem.impls(places)}  # ours at the place comes last
    if name not in impls:
        p.error(f"--impl must be one of {[*impls]}, got {name!r}")
    return impls[name]


def launch(run: Run, copies: int, launches: int, device: torch.device) -> None:
    """So many calls, a copy after the other from the second on: the check left the first in L2."""
    with _profiled(device):
        for i in range(1, launches + 1):
            run(i % copies)


@contextmanager
def _profiled(device: torch.device) -> Iterator[None]:
    """A profiler that waits for its start sees what is launched inside, and nothing else."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.profiler.profile():
        yield
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
