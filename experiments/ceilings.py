"""What the machine itself can do, measured in the run whose kernels are held against it."""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from experiments.readings import CEILING, Reading
from experiments.timing import Effort, Run, Times, time_calls
from kernels.tile import cdiv, device_sms

STREAM_BYTES = 1 << 30
MATMUL_SIZE = 8192
# (int32 words a program has in flight, warps): a stream's speed hangs on bytes in flight, and which
# form is fastest on the GPU: the best one is the ceiling
STREAM_FORMS = ((4096, 4), (8192, 8), (16384, 8))
PARTITION_FORM = (16384, 32)  # one program that fills its SM


@triton.jit
def _read_stream_kernel(x_ptr, out_ptr, num_tiles, STAGES: tl.constexpr, BLOCK: tl.constexpr):
    """One program sums tiles of int32 words, num_programs apart, and writes one word."""
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        total += tl.load(x_ptr + tile * BLOCK + offs)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


def read_stream(
    x: Tensor, out: Tensor, block: int, num_warps: int, *, num_programs: int | None = None
) -> None:
    """Read all of x once. x: [n] int32, n a multiple of block; out: [n / block] or more int32.

    A program per tile, or num_programs that go on from tile to tile with loads in flight.
    """
    num_tiles, rest = divmod(x.numel(), block)
    if rest or x.dtype != torch.int32 or x.numel() >= 2**31:
        raise ValueError(
            f"x must be int32 in tiles of {block}, under 2**31 words, got {x.dtype} and {x.numel()}"
        )
    programs = num_tiles if num_programs is None else min(num_programs, num_tiles)
    if out.numel() < programs:
        raise ValueError(f"out must hold {programs} sums, got {out.numel()}")
    _read_stream_kernel[(programs,)](
        x,
        out,
        num_tiles,
        STAGES=1 if num_programs is None else 3,
        BLOCK=block,
        num_warps=num_warps,
    )


def peer_device(device: torch.device) -> torch.device | None:
    """Another GPU that `device` can write to; on the CPU there is one: itself."""
    if device.type != "cuda":
        return device
    index = device.index or 0
    for other in range(torch.cuda.device_count()):
        if other != index and torch.cuda.can_device_access_peer(index, other):
            return torch.device("cuda", other)
    return None


def measure_ceilings(
    device: torch.device,
    dtype: torch.dtype,
    nums_sms: Sequence[int],
    effort: Effort,
    *,
    stream_bytes: int = STREAM_BYTES,
    matmul_size: int = MATMUL_SIZE,
) -> Iterator[Reading]:
    """The ceilings, not stamped yet: read stream, copy, matmul, copy to a peer."""
    x = torch.ones(stream_bytes // 4, dtype=torch.int32, device=device)
    yield from _read_streams(x, nums_sms, effort)
    y = torch.empty_like(x)
    yield _copy(x, y, effort)
    peer = peer_device(device)
    if peer is None:
        print("skipped the peer copy: no second GPU that this one can write to")
    else:
        z = torch.empty_like(x, device=peer)
        times = time_calls(lambda _: z.copy_(x), 1, device, effort, captured=False)
        yield _reading("peer copy", x, times, num_bytes=stream_bytes)
    yield _matmul(device, dtype, matmul_size, effort)


def _read_streams(x: Tensor, nums_sms: Sequence[int], effort: Effort) -> Iterator[Reading]:
    num_bytes, total = x.numel() * 4, x.sum(dtype=torch.int64).int()
    out = torch.empty(x.numel() // STREAM_FORMS[0][0], dtype=torch.int32, device=x.device)
    num_sms = device_sms(x.device)

    def timed(form: tuple[int, int], programs: int | None) -> Times:
        def run(_: int) -> None:
            read_stream(x, out, *form, num_programs=programs)

        out.zero_()
        run(0)
        if out.sum(dtype=torch.int64).int() != total:
            raise AssertionError(f"the read stream {form}, {programs} must sum to {total}")
        return time_calls(run, 1, x.device, effort)

    best = min((timed(form, None) for form in STREAM_FORMS), key=lambda t: t.p50)
    persistent = timed(PARTITION_FORM, num_sms)
    yield _reading(
        "read stream", x, min(best, persistent, key=lambda t: t.p50), num_bytes=num_bytes
    )
    for n in nums_sms:
        if n <= num_sms:
            yield _reading("read stream", x, timed(PARTITION_FORM, n), num_bytes=num_bytes, sms=n)


def _copy(x: Tensor, y: Tensor, effort: Effort) -> Reading:
    """The faster of a copy of all of x, and of an odd part of it: of two buffers that lie powers of
    2 apart, reads and writes crowd on the same channels of memory."""

    def timed(part: Tensor) -> Reading:
        to = y[: part.numel()]
        times = time_calls(lambda _: to.copy_(part), 1, x.device, effort)
        return _reading("copy", part, times, num_bytes=2 * part.nbytes)

    return max(map(timed, (x, x[: x.numel() * 7 // 16])), key=lambda reading: reading.gb_s)


def _matmul(device: torch.device, dtype: torch.dtype, size: int, effort: Effort) -> Reading:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    run: Run = lambda _: torch.mm(a, b, out=c)  # noqa: E731
    times = time_calls(run, 1, device, effort)
    shape = f"M={size} N={size} K={size}"
    num_bytes = 3 * size * size * a.element_size()
    return _reading("matmul", a, times, num_bytes=num_bytes, flops=2 * size**3, shape=shape)


def _reading(
    impl: str,
    x: Tensor,
    times: Times,
    *,
    num_bytes: int,
    flops: int = 0,
    sms: int | None = None,
    shape: str | None = None,
) -> Reading:
    size = f"{cdiv(x.numel() * x.element_size(), 1 << 20)} MiB"
    return Reading(
        kernel=CEILING,
        impl=impl,
        shape=size if shape is None else shape,
        dtype=str(x.dtype).removeprefix("torch."),
        partitioning="none" if sms is None else "grid",
        sms_asked=sms,
        # one program an SM, so this stream alone keeps to the SMs it asked for
        sms_granted=device_sms(x.device) if sms is None else sms,
        ms_p20=times.p20,
        ms_p50=times.p50,
        ms_p80=times.p80,
        bytes=num_bytes,
        flops=flops,
    )
