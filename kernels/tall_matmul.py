"""Matrix products of many tokens on Hopper: which tile, and the launch of `tall_pipeline`.

How large a tile is decides how often weights are read again and how evenly the tiles divide among
the SMs: `choose_tile` weighs the two.
"""

from torch import Tensor

from kernels import hopper
from kernels.dependent_launch import launch_options
from kernels.tall_pipeline import _tall_matmul_kernel
from kernels.tile import Tile, cdiv, device_sms

TALL_BLOCK_M = 64  # rows of a tile from which wgmma takes it
BLOCK_K = 64  # elements: 128 bytes, a row of the widest swizzle
CHUNK_SIZE = 4096  # elements of out that a consumer stores at a time
OUT_BUFFERS = 2  # chunks of one consumer on their way
MAX_STAGES = 8  # deeper rings were not tried
SHARED_BYTES = 226 * 1024  # of the 227 KiB on Hopper: barriers and the warps' hand-over take some
GROUP_ROWS = 1024  # rows of x that tiles at work together share in L2


def ring_tile(consumers: int, rows: int, block_n: int, *, gated: bool) -> Tile:
    """A tile of `rows` rows for each consumer, four warps, with the deepest ring that fits."""
    block_m = consumers * rows
    stage_bytes = (block_m + _width(block_n, gated)) * BLOCK_K * 2
    left = SHARED_BYTES - consumers * OUT_BUFFERS * CHUNK_SIZE * 2
    return Tile(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        num_warps=4 * consumers,
        num_stages=min(left // stage_bytes, MAX_STAGES),
    )


def _width(block_n: int, gated: bool) -> int:
    """Rows of the weight behind so many columns of out."""
    return 2 * block_n if gated else block_n


# with the time that an SM takes for one, as a share of the largest's: read off runs on an H100 in
# which the tiles divide evenly, and small ones come off badly because they read x and weights often
PLAIN_TILES = (
    (ring_tile(2, 64, 256, gated=False), 1.0),
    (ring_tile(2, 128, 128, gated=False), 1.01),
    (ring_tile(2, 64, 128, gated=False), 0.52),
    (ring_tile(1, 64, 128, gated=False), 0.42),
    (ring_tile(1, 64, 64, gated=False), 0.36),
)
GATED_TILES = (
    (ring_tile(2, 64, 128, gated=True), 1.0),
    (ring_tile(2, 128, 64, gated=True), 1.01),
    (ring_tile(2, 64, 64, gated=True), 0.61),
    (ring_tile(1, 64, 64, gated=True), 0.33),
)
# where all tokens fit one row of tiles, it is the weights' bytes that take the time
FLAT_PLAIN_TILE = ring_tile(1, TALL_BLOCK_M, 64, gated=False)
FLAT_GATED_TILE = ring_tile(1, TALL_BLOCK_M, 32, gated=True)


def choose_tile(num_tokens: int, width: int, num_sms: int, *, gated: bool) -> Tile:
    """A tile for [num_tokens, depth] x [depth, width] on so many SMs: that whose fullest SM is
    through first."""
    if num_tokens <= TALL_BLOCK_M:
        return FLAT_GATED_TILE if gated else FLAT_PLAIN_TILE

    def cost(tile: Tile, time: float) -> float:
        num_tiles = cdiv(num_tokens, tile.BLOCK_M) * cdiv(width, tile.BLOCK_N)
        return cdiv(num_tiles, num_sms) * time

    return min(GATED_TILES if gated else PLAIN_TILES, key=lambda choice: cost(*choice))[0]


def takes(x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor) -> bool:
    """Whether `launch_tall_matmul` can: Hopper, a 16-bit dtype, rows that TMA can address."""
    if x.dtype not in hopper.GL_DTYPES or not hopper.has_wgmma(x.device):
        return False
    matrices = [x, weight, out] if residual is None else [x, weight, out, residual]
    return all(hopper.is_aligned(matrix) for matrix in matrices)


def launch_tall_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rstd: Tensor | None,
    out: Tensor,
    *,
    gated: bool,
    tile: Tile,
    num_sms: int | None,
) -> None:
    """Launch over arguments that the caller has checked and that this module `takes`.

    x: [T, K] fp16 or bf16, rstd: [T] fp32 -> out: [T, N], or [T, N / 2] gated. A tile's warps are
    those that multiply, its stages the depth of the ring. ValueError where the kernel has no form
    for it; Triton raises OutOfResources where the ring does not fit.
    """
    if not has_form(tile, gated=gated):
        raise ValueError(
            "tile must have 4 or 8 warps, 64 or 128 rows for every 4 of them, 32 to 256 columns,"
            f" BLOCK_K {BLOCK_K}, 2 stages or more, and fit the registers, got {tile}"
        )
    (num_tokens, K), N = x.shape, out.shape[1]
    consumers = tile.num_warps // 4
    rows = tile.BLOCK_M // consumers
    num_tiles = cdiv(num_tokens, tile.BLOCK_M) * cdiv(N, tile.BLOCK_N)
    sms = device_sms(x.device) if num_sms is None else num_sms
    # a lone consumer takes what the loading warps leave of 256 threads with 128 registers each
    options = {"maxnreg": 128} if consumers == 1 else {}
    _tall_matmul_kernel[(min(num_tiles, sms),)](
        hopper.describe(x, rows, BLOCK_K),
        hopper.describe(weight, tile.BLOCK_N, BLOCK_K),
        hopper.describe(out, rows, min(CHUNK_SIZE // rows, tile.BLOCK_N)),
        bias,
        residual,
        rstd,
        num_tokens,
        N,
        K,
        residual.stride(0) if residual is not None else 0,
        GATED=gated,
        CONSUMERS=consumers,
        STAGES=tile.num_stages,
        OUT_BUFFERS=OUT_BUFFERS,
        GROUP_M=GROUP_ROWS // tile.BLOCK_M,
        num_warps=4,  # of the first consumer; the kernel adds the others
        **options,
        **launch_options(x.device),
    )


def has_form(tile: Tile, *, gated: bool) -> bool:
    """Whether the kernel can be compiled for a tile, and gets through with it."""
    if tile.num_warps not in (4, 8) or tile.BLOCK_K != BLOCK_K:
        return False
    consumers = tile.num_warps // 4
    rows = tile.BLOCK_M // consumers
    return (
        tile.BLOCK_M in (64 * consumers, 128 * consumers)
        and tile.BLOCK_N in (32, 64, 128, 256)
        and rows * _width(tile.BLOCK_N, gated) <= consumers * 64 * 128  # what registers hold
        and tile.num_stages >= 2  # a buffer is given back only once the next one is there
    )
