"""Where and when a launch ran, by what each of its programs reads from the hardware."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS_PER_SM = 16  # of the whole GPU, one warp each: they fit it all at once
HOLD_NS = 50_000  # longer than it takes to start them all
OVERLAP_NS = 1_000_000  # longer than it takes the host to launch on every stream, as a rule
OVERLAP_TRIES = 3  # a host that was held up for longer is not a queue that streams share


@triton.jit
def _nanoseconds():
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def _record_launch_kernel(records_ptr, hold_ns):
    """One program notes its SM, start and end, and holds its place so that others go elsewhere."""
    sm_id = tl.inline_asm_elementwise(
        "mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
    start = _nanoseconds()
    now = start
    while now - start < hold_ns:
        now = _nanoseconds()
    record_ptr = records_ptr + tl.program_id(0) * 3
    tl.store(record_ptr, sm_id.to(tl.int64))
    tl.store(record_ptr + 1, start)
    tl.store(record_ptr + 2, now)


def launch_records(device: torch.device | str) -> Tensor:
    """[programs, 3] int64 for `record_launch`; -1 where no program has written."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return torch.full((PROGRAMS_PER_SM * num_sms, 3), -1, dtype=torch.int64, device=device)


def record_launch(records: Tensor, hold_ns: int = HOLD_NS) -> None:
    """Launch a program for each row on the current stream, also under the capture of a graph.

    records: [programs, 3] int64 <- SM, start and end in ns. Every program holds its place for
    hold_ns, so that no SM which the stream may use goes without one.
    """
    if records.dtype != torch.int64 or records.dim() != 2 or records.stride() != (3, 1):
        raise ValueError(f"records must be [n, 3] int64, got {list(records.shape)} {records.dtype}")
    _record_launch_kernel[(len(records),)](records, hold_ns, num_warps=1)


def recorded_sms(records: Tensor) -> set[int]:
    """The SMs that the last launch ran on; waits for it. ValueError where a program is missing."""
    return set(_written(records)[:, 0].tolist())


def recorded_span(records: Tensor) -> tuple[int, int]:
    """Start of the first and end of the last program, in ns of one clock for the whole GPU."""
    rows = _written(records)
    return int(rows[:, 1].min()), int(rows[:, 2].max())


def _written(records: Tensor) -> Tensor:
    if records.is_cuda:
        torch.cuda.synchronize(records.device)
    rows = records.cpu()
    if (rows < 0).any():
        raise ValueError(f"every program must have run, got {int((rows < 0).any(1).sum())} without")
    return rows


def are_concurrent(streams: Sequence[torch.cuda.Stream]) -> bool:
    """Whether launches on all these streams run at the same time. Disjoint SMs do not promise it:
    two streams may share one hardware queue."""
    records = [launch_records(stream.device) for stream in streams]

    def overlap(hold_ns: int) -> bool:
        torch.cuda.synchronize(streams[0].device)
        for stream, record in zip(streams, records, strict=True):
            with torch.cuda.stream(stream):
                record_launch(record, hold_ns)
        starts, ends = zip(*map(recorded_span, records), strict=True)
        return max(starts) < min(ends)

    overlap(0)  # compiles
    return any(overlap(OVERLAP_NS) for _ in range(OVERLAP_TRIES))
