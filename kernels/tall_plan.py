"""How `tall_matmul` divides a product among SMs: which tile, and whether programs share some.

How large a tile is decides how often weights are read again and how evenly the tiles divide among
the SMs: `choose_plan` weighs the two. Where tiles do not divide, `tall_deal` can cut some.
"""

from dataclasses import dataclass

from kernels.tile import Tile, cdiv

TALL_BLOCK_M = 64  # rows of a tile from which wgmma takes it
BLOCK_K = 64  # elements: 128 bytes, a row of the widest swizzle
CHUNK_SIZE = 4096  # elements of out that a consumer stores at a time
OUT_BUFFERS = 2  # chunks of one consumer on their way
MAX_STAGES = 8  # deeper rings are slower where products take as long as their bytes
DEEP_STAGES = 17  # where it is the bytes alone, as many as there is room for
SHARED_BYTES = 226 * 1024  # of the 227 KiB on Hopper: barriers and the warps' hand-over take some
MAX_SIDE = 4  # tiles down the rows whose programs stand side by side
MAX_ROUNDS = 4  # such rows of tiles: of more, whole tiles divide well enough
TIMED_DEPTH = 4096  # K, for which the tiles' times are
# elements of a weight that come from memory in the time of the largest tile
READ_SIZE = 77_000_000
# what it costs to share tiles, in times of the largest and for each SM: sums are passed on through
# a memory that all SMs keep busy, and programs at other steps share less of x. On all SMs of an
# H100 some 20 us
SHARING = 0.45 / 132
# multiply-adds from which on an H100 the order of programs is worth more than an early start
LONG_PRODUCT = 9e9


@dataclass(frozen=True)
class Plan:
    """A tile, and how `tall_deal` deals tiles out; side 0: whole ones."""

    tile: Tile
    side: int = 0

    def num_programs(self, num_tokens: int, width: int, num_sms: int) -> int:
        """Programs to launch on so many SMs."""
        if self.side:
            return num_sms // self.side * self.side
        return min(_num_tiles(num_tokens, width, self.tile), num_sms)


def ring_tile(
    consumers: int, rows: int, block_n: int, *, gated: bool, max_stages: int = MAX_STAGES
) -> Tile:
    """A tile of `rows` rows for each consumer, four warps, with the deepest ring that fits."""
    block_m = consumers * rows
    stage_bytes = (block_m + ring_width(block_n, gated)) * BLOCK_K * 2
    left = SHARED_BYTES - consumers * OUT_BUFFERS * rows * chunk_width(rows, block_n) * 2
    return Tile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        num_warps=4 * consumers,
        num_stages=min(left // stage_bytes, max_stages),
    )


def parts(block_n: int) -> tuple[int, int]:
    """Columns of the two parts that a tile's are cut in: powers of 2; of such a one the second is
    empty."""
    first = 1 << block_n.bit_length() - 1
    return first, block_n - first


def chunk_width(rows: int, block_n: int) -> int:
    """Columns that a consumer of so many rows stores at a time, of either part."""
    first, rest = parts(block_n)
    return min(CHUNK_SIZE // rows, rest or first)


def ring_width(block_n: int, gated: bool) -> int:
    """Rows of the weight behind so many columns of out."""
    return 2 * block_n if gated else block_n


# with the time that an SM takes for one, as a share of the largest's: read off runs on an H100 in
# which the tiles divide evenly, and small ones come off badly because they read x and weights often
PLAIN_TILES = (
    (ring_tile(2, 64, 256, gated=False), 1.0),
    (ring_tile(2, 128, 128, gated=False), 1.01),
    (ring_tile(2, 64, 192, gated=False), 0.78),
    (ring_tile(2, 64, 128, gated=False), 0.52),
    (ring_tile(1, 64, 128, gated=False), 0.42),
    (ring_tile(1, 64, 64, gated=False), 0.36),
)
GATED_TILES = (
    (ring_tile(2, 64, 128, gated=True), 1.0),
    (ring_tile(2, 128, 64, gated=True), 1.01),
    (ring_tile(2, 64, 96, gated=True), 0.84),
    (ring_tile(2, 64, 64, gated=True), 0.61),
    (ring_tile(1, 64, 64, gated=True), 0.41),
)
# where K is shorter than TIMED_DEPTH the smallest comes off better
SHORT_GATED_TILES = (*GATED_TILES[:-1], (GATED_TILES[-1][0], 0.33))
# where all tokens fit one row of tiles, it is the weights' bytes that take the time
FLAT_PLAIN_TILES = tuple(
    ring_tile(1, TALL_BLOCK_M, width, gated=False, max_stages=DEEP_STAGES) for width in (64, 32)
)
FLAT_GATED_TILES = (ring_tile(1, TALL_BLOCK_M, 32, gated=True, max_stages=DEEP_STAGES),)


def tiles_for(depth: int, *, gated: bool) -> tuple[tuple[Tile, float], ...]:
    """Those to choose from for K of this depth, with their times."""
    if not gated:
        return PLAIN_TILES
    return GATED_TILES if depth >= TIMED_DEPTH else SHORT_GATED_TILES


def choose_plan(
    num_tokens: int, width: int, depth: int, num_sms: int, *, gated: bool, may_share: bool
) -> Plan:
    """For [num_tokens, depth] x [depth, width] on so many SMs: that whose fullest SM is through
    first."""
    if num_tokens <= TALL_BLOCK_M:
        return Plan(_flat_tile(width, num_sms, gated=gated))
    tiles = tiles_for(depth, gated=gated)
    read_time = ring_width(width, gated) * depth / READ_SIZE
    costs = {  # of those through when the weights are, the smallest, which evens out best
        Plan(tile): max(
            _rounds(num_tokens, width, tile, num_sms) * time * depth / TIMED_DEPTH, read_time
        )
        for tile, time in reversed(tiles)
    }
    largest, time = tiles[0]
    side = _side(cdiv(num_tokens, largest.BLOCK_M))
    if may_share and 1 < side <= num_sms:  # alone, a row of tiles is bound by its weights' bytes
        columns = _num_tiles(num_tokens, width, largest) / side / (num_sms // side)
        if columns >= 1:  # a sum is made in order: cut in more pieces, none would be through sooner
            costs[Plan(largest, side)] = columns * time * depth / TIMED_DEPTH + SHARING * num_sms
    return min(costs, key=costs.__getitem__)


def starts_early(num_tokens: int, width: int, depth: int, *, gated: bool) -> bool:
    """Whether the product's programs had better start while the kernel before ends. Those that do
    take SMs in the order in which these come free, so that tiles of the same columns, which read
    the same weights at the same time, end up apart: a long product loses more by that than an early
    start gains, as measured on a whole H100. Flat ones share no weights. A kernel is compiled for
    either, so that this goes by whole tiles too."""
    num_rows = cdiv(num_tokens, TALL_BLOCK_M) * TALL_BLOCK_M
    size = num_rows * ring_width(width, gated) * depth
    return num_tokens <= TALL_BLOCK_M or size < LONG_PRODUCT


def _flat_tile(width: int, num_sms: int, *, gated: bool) -> Tile:
    """That of which the fullest SM has the fewest columns."""

    def columns(tile: Tile) -> int:
        return _rounds(TALL_BLOCK_M, width, tile, num_sms) * tile.BLOCK_N

    return min(FLAT_GATED_TILES if gated else FLAT_PLAIN_TILES, key=columns)


def _rounds(num_tokens: int, width: int, tile: Tile, num_sms: int) -> int:
    """Tiles of the fullest SM."""
    return cdiv(_num_tiles(num_tokens, width, tile), num_sms)


def _num_tiles(num_tokens: int, width: int, tile: Tile) -> int:
    return cdiv(num_tokens, tile.BLOCK_M) * cdiv(width, tile.BLOCK_N)


def _side(num_m: int) -> int:
    """Programs side by side for so many tiles down the rows; 0 where they do not divide well."""
    if num_m <= MAX_SIDE:
        return num_m
    return MAX_SIDE if num_m % MAX_SIDE == 0 and num_m <= MAX_ROUNDS * MAX_SIDE else 0
