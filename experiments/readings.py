"""One line of kernels.csv, and the numbers that follow from it. Knows nothing of devices."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from experiments.harness import read_rows

CEILING = "ceiling"
# how a launch came to have only some SMs: not at all; by the size of its grid alone, which leaves
# to the hardware which SMs; by a green context
PARTITIONINGS = ("none", "grid", "green")
# what the traffic of a kernel is held against; "copy" where it writes as much as it reads
BANDWIDTH = {
    "decode_attention": "read stream",
    "prefill_attention": "read stream",
    "mlp": "read stream",
    "linear": "read stream",
    "sample": "read stream",
    "rms_norm": "copy",
    "add_rms_norm": "copy",
    "rope_store": "copy",
    "copy_blocks": "copy",
    "copy_blocks to peer": "peer copy",
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Raw counts of one kernel on one shape; the fields are the columns of the CSV."""

    kernel: str  # a launcher of `kernels`, or "ceiling"
    impl: str  # "ours" or a peer; of a ceiling, which one
    shape: str
    dtype: str
    partitioning: str  # of PARTITIONINGS
    sms_asked: int | None  # None: no partition
    sms_granted: int  # SMs that the launch could run on
    ms_p20: float
    ms_p50: float
    ms_p80: float
    bytes: int  # what has to move at least
    flops: int  # of matrix products; 0 where there are none
    date: str = ""
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    driver: str = ""
    commit: str = ""

    @property
    def run(self) -> tuple[str, str, str]:
        """What the readings of one run have in common."""
        return self.gpu, self.date, self.commit

    @property
    def key(self) -> tuple[object, ...]:
        """What a later reading has to share to replace this one."""
        return self.gpu, self.impl, *self.where, self.sms_granted

    @property
    def where(self) -> tuple[object, ...]:
        """What it has in common with the peers that it is held against."""
        return self.kernel, self.shape, self.dtype, self.partitioning, self.sms_asked

    @property
    def gb_s(self) -> float:
        return self.bytes / self.ms_p50 / 1e6

    @property
    def tflop_s(self) -> float:
        return self.flops / self.ms_p50 / 1e9


COLUMNS = [f.name for f in fields(Reading)]
INTS = ("sms_granted", "bytes", "flops")
FLOATS = ("ms_p20", "ms_p50", "ms_p80")


@dataclass(frozen=True)
class Ceilings:
    """What one machine reached in one run: GB/s by name of the stream, and TFLOP/s."""

    gb_s: dict[str, float]
    tflop_s: float

    @classmethod
    def of(cls, readings: Iterable[Reading]) -> "Ceilings":
        """The best of each ceiling over the whole GPU. ValueError where a needed one is missing."""
        rows = [r for r in readings if r.kernel == CEILING and r.sms_asked is None]
        gb_s: dict[str, float] = {}
        for r in rows:
            if not r.flops:
                gb_s[r.impl] = max(gb_s.get(r.impl, 0.0), r.gb_s)
        tflop_s = max((r.tflop_s for r in rows), default=0.0)
        missing = {"read stream", "copy"} - set(gb_s) | ({"matmul"} if not tflop_s else set())
        if missing:
            raise ValueError(f"a run must hold its ceilings, got none for {sorted(missing)}")
        return cls(gb_s, tflop_s)

    def bandwidth(self, kernel: str) -> float:
        """GB/s that the kernel's traffic is held against."""
        name = BANDWIDTH.get(kernel, "read stream")
        if name not in self.gb_s:
            raise ValueError(f"a run with {kernel} must hold the ceiling {name!r}, got none")
        return self.gb_s[name]

    def is_compute_bound(self, reading: Reading) -> bool:
        """Whether the matrix products alone would take longer than the traffic alone."""
        return reading.flops / self.tflop_s > reading.bytes / self.bandwidth(reading.kernel) * 1e3

    def percent(self, reading: Reading) -> float:
        """Shortest possible time of the whole GPU, in percent of the time taken."""
        if self.is_compute_bound(reading):
            return 100 * reading.tflop_s / self.tflop_s
        return 100 * reading.gb_s / self.bandwidth(reading.kernel)


def best_peers(readings: Sequence[Reading]) -> dict[tuple[object, ...], Reading]:
    """The fastest peer by `Reading.where`: of a launch on a partition, one on the same."""
    best: dict[tuple[object, ...], Reading] = {}
    for r in readings:
        is_peer = r.kernel != CEILING and r.impl != "ours"
        if is_peer and (r.where not in best or r.ms_p50 < best[r.where].ms_p50):
            best[r.where] = r
    return best


def read_csv(path: Path) -> list[Reading]:
    """Every line of a kernels.csv. ValueError, with the line, where it is not one."""
    readings = []
    for line, row in enumerate(read_rows(path, COLUMNS), start=2):
        try:
            readings.append(_parse(row))
        except (TypeError, ValueError) as error:
            where = f"{path}, line {line}"
            raise ValueError(f"{where} must be a whole reading, got {row}") from error
    if not readings:
        raise ValueError(f"{path} must hold readings, got a header alone")
    return readings


def _parse(row: dict[str, str]) -> Reading:
    if None in row or None in row.values():
        raise ValueError("a cell too many or too few")
    values: dict[str, object] = dict(row)
    values |= {name: int(row[name]) for name in INTS}
    values |= {name: float(row[name]) for name in FLOATS}
    values["sms_asked"] = int(row["sms_asked"]) if row["sms_asked"] else None
    reading = Reading(**values)  # type: ignore[arg-type]
    if reading.ms_p50 <= 0:
        raise ValueError("a time must be positive")
    is_whole = reading.sms_asked is None
    if reading.partitioning not in PARTITIONINGS or is_whole != (reading.partitioning == "none"):
        raise ValueError("a partition must say what made it")
    return reading


def newest(readings: Iterable[Reading]) -> list[Reading]:
    """The last run's reading of each key, in the order of the file."""
    latest: dict[tuple[object, ...], Reading] = {}
    for r in readings:
        if r.key not in latest or r.date >= latest[r.key].date:
            latest.pop(r.key, None)
            latest[r.key] = r
    return list(latest.values())
