"""How many SMs each stage of a split gets: what is asked for, and what a device grants.

Pure arithmetic, of what CUDA's guide says about the grain and what a driver did with 132 SMs. What
a device really granted, `streams` reads back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product


@dataclass(frozen=True)
class Grain:
    """What an architecture can tell apart: SMs come in groups that share hardware."""

    least: int  # SMs of the smallest partition, a multiple of step
    step: int  # SMs: every partition but the rest is a multiple

    def of_pieces(self, num_pieces: int) -> int:
        """SMs of which so many pieces that are cut out are multiples. One is cut as it is; several
        are put together from equal groups, each of which is a partition itself."""
        return self.step if num_pieces <= 1 else self.least


# by major compute capability, the later ones like 9; as in CUDA's guide to green contexts
GRAINS = {6: Grain(1, 1), 7: Grain(2, 2), 8: Grain(4, 2), 9: Grain(8, 8)}


def grain(capability: tuple[int, int]) -> Grain:
    """Of a compute capability (major, minor). ValueError where there are no green contexts."""
    if capability[0] < min(GRAINS):
        raise ValueError(f"capability must be 6.0 or later, got {'.'.join(map(str, capability))}")
    return GRAINS[min(capability[0], max(GRAINS))]


@lru_cache(maxsize=64)
def legal_splits(
    num_sms: int, capability: tuple[int, int], num_stages: int = 2
) -> tuple[tuple[int, ...], ...]:
    """Every way to give SMs of a device to so many stages, sorted; some may leave SMs idle.

    Either each stage has a multiple of the grain, or one of them has the rest, all that the others
    leave. ValueError where num_stages is below 1.
    """
    if num_stages < 1:
        raise ValueError(f"num_stages must be 1 or more, got {num_stages}")
    of_device = grain(capability)
    found = set(_cut_out(num_sms, of_device, num_stages))
    for others in _cut_out(num_sms, of_device, num_stages - 1):
        rest = num_sms - sum(others)
        if rest >= of_device.least:
            found |= {(*others[:i], rest, *others[i:]) for i in range(num_stages)}
    return tuple(sorted(found))


def _cut_out(num_sms: int, of_device: Grain, num_pieces: int) -> Iterator[tuple[int, ...]]:
    """SMs of so many pieces, each cut out. Of 132 SMs a driver made 15 groups of 8, not 16, for a
    group does not straddle what it shares: all but one of the groups are there for sure."""
    step = of_device.of_pieces(num_pieces)
    most = num_sms if num_pieces <= 1 else (num_sms // step - 1) * step
    sizes = [n for n in range(step, num_sms + 1, step) if n >= of_device.least]
    for pieces in product(sizes, repeat=num_pieces):
        if sum(pieces) <= most:
            yield pieces


@dataclass(frozen=True)
class Partition:
    """SMs of each stage, as asked for and as the arithmetic says they will be granted."""

    asked: tuple[int, ...]
    granted: tuple[int, ...]
    num_sms: int  # of the whole device
    grain: Grain

    @classmethod
    def of(cls, asked: Sequence[int], num_sms: int, capability: tuple[int, int]) -> "Partition":
        """The legal split that gives what was asked, or else falls least short; then the tightest.

        So a count is rounded up to the grain, and where the last SMs do not fill a group, a stage
        gets the rest. ValueError where a count is below the smallest partition, and where together
        they are more than the device has.
        """
        asked, of_device = tuple(asked), grain(capability)
        least, step = of_device.least, of_device.of_pieces(len(asked))
        if not asked or min(asked) < least:
            raise ValueError(f"asked must be {least} or more SMs for each stage, got {asked}")
        if sum(asked) > num_sms:
            raise ValueError(
                f"asked must add up to at most the device's {num_sms} SMs, got "
                f"{' + '.join(map(str, asked))} = {sum(asked)}"
            )

        def cost(split: tuple[int, ...]) -> tuple[int, int, list[int], tuple[int, ...]]:
            more = [got - want for got, want in zip(split, asked, strict=True)]
            short, excess = -sum(n for n in more if n < 0), sum(n for n in more if n > 0)
            ragged = [n % step for n in split]  # among equals the last stage gets the rest
            return short, excess, ragged, split

        splits = legal_splits(num_sms, capability, len(asked))
        return cls(asked, min(splits, key=cost), num_sms, of_device)

    @property
    def rest(self) -> int | None:
        """The stage that gets all that the others leave; None where each is cut out by itself."""
        if len(self.granted) == 1 or self.idle_sms:
            return None
        step = self.grain.of_pieces(len(self.granted) - 1)
        ragged = [i for i, n in enumerate(self.granted) if n % step]
        return ragged[0] if ragged else len(self.granted) - 1

    @property
    def idle_sms(self) -> int:
        """SMs that no stage has."""
        return self.num_sms - sum(self.granted)

    @property
    def group_sms(self) -> int:
        """SMs in each of the equal groups that the device is cut into."""
        cut_out = [n for i, n in enumerate(self.granted) if i != self.rest]
        return cut_out[0] if len(cut_out) == 1 else self.grain.of_pieces(len(cut_out))

    @property
    def num_groups(self) -> tuple[int, ...]:
        """Groups of each stage; 0 for the one that gets the rest."""
        return tuple(
            0 if i == self.rest else n // self.group_sms for i, n in enumerate(self.granted)
        )
