"""What tests draw: shapes, layouts and a seed, never tensor elements. And how they compare."""

from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# bfloat16 on the GPU alone: the interpreter gets its arithmetic wrong without a word
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * torch.cuda.is_available()

# Unit of tolerance: the spacing of the dtype at 1. In fp32 it is not one rounding but the order of
# the sums that decides, and exp and rsqrt, which are right to some bits less on a GPU: 2**-19.
UNIT = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-19}

# for tests that launch the same twice: the interpreter runs programs in order, and finds little
run_twice = settings(max_examples=50 if DEVICE == "cuda" else 6)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)
# (H_KV, GQA group); no more heads than eight, which the interpreter walks through one by one
heads = st.sampled_from([(kv, group) for kv in (1, 2, 3) for group in range(1, 8 // kv + 1)])
head_dims = st.sampled_from([16, 32, 64, 96, 128, 256])
block_sizes = st.sampled_from([1, 8, 16, 32])


def randn(seed: int, *shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """One tensor per shape, the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def permutation(seed: int, n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def ints(values: list[int] | tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def strided(x: Tensor) -> Tensor:
    """The same rows, further apart, with NaN between them."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 16), float("nan"))
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def poisoned(like: Tensor, dtype: torch.dtype) -> Tensor:
    """NaN in like's shape: what a launch leaves unwritten is seen."""
    return torch.full_like(like, float("nan"), dtype=dtype)


def bits(x: Tensor) -> Tensor:
    """The bit patterns of x: equal where x is, NaN included."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert torch.equal(bits(actual), bits(expected))


def row_rms(x: Tensor) -> Tensor:
    """Root mean square of the last dim: the scale of its sums, whatever cancels in one of them."""
    return x.float().square().mean(-1, keepdim=True).sqrt()


def assert_close(
    actual: Tensor, expected: Tensor, *, scale: Tensor | None = None, units: float = 2
) -> None:
    """|actual - expected| <= units * spacing of actual's dtype at max(|expected|, scale).

    expected is the reference in fp32, from the same inputs. 2 units hold one rounding of the
    result and one of an intermediate value (half a unit each) with a factor 2 to spare. scale is
    for sums, whose terms are each rounded before they cancel: the root of their sum of squares.
    """
    assert expected.dtype == torch.float32 and actual.shape == expected.shape
    size = expected.abs() if scale is None else torch.maximum(expected.abs(), scale)
    error = (actual.float() - expected).abs()
    limit = units * UNIT[actual.dtype] * size + torch.finfo(actual.dtype).smallest_normal
    bad = ~(error <= limit)  # NaN is bad
    if bad.any():
        worst = int(torch.where(error.isnan(), torch.inf, error / limit).argmax())
        at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} differ; worst at {at}: {float(actual[at])}, "
            f"wanted {float(expected[at])} +- {float(limit[at])}"
        )


def assert_attended(actual: Tensor, expected: Tensor) -> None:
    """assert_close for weighted means of values: each weight is rounded once to their dtype.

    In fp32 the sums err instead, reference and kernel alike, in proportion to the values and not to
    their mean, which is the smaller the more of them cancel: 4 units seen in 300 tokens.
    """
    units = 8 if actual.dtype == torch.float32 else 2
    assert_close(actual, expected, scale=row_rms(expected), units=units)


@dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """Ragged requests over one layer of a scattered KV pool, as the engine makes them."""

    q: Tensor  # [T, H, D]
    pool: Tensor  # [num_blocks, L, 2, block_size, H_KV, D]
    kv_cache: Tensor  # pool[:, layer]
    block_table: Tensor  # [B, max_blocks] int32
    cu_seqlens: Tensor  # [B + 1] int32
    context_lens: Tensor  # [B] int32

    @property
    def paging(self) -> tuple[Tensor, Tensor]:
        return self.kv_cache, self.block_table

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Shapes of a PagedBatch. A request without query_lens has one query, a padding row too."""

    context_lens: tuple[int, ...]
    query_lens: tuple[int, ...] | None = None
    num_kv_heads: int = 1
    group: int = 2
    head_dim: int = 64
    block_size: int = 16
    num_layers: int = 2
    garbage: float = float("nan")  # in every slot that holds no token of a request

    def build(self, dtype: torch.dtype, seed: int) -> PagedBatch:
        query_lens = self.query_lens or (1,) * len(self.context_lens)
        block_table, num_blocks = self._deal_blocks(seed)
        pool = torch.full(
            (num_blocks, self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim),
            self.garbage,
            dtype=dtype,
            device=DEVICE,
        )
        kv_cache = pool[:, seed % self.num_layers]
        num_heads = self.num_kv_heads * self.group
        q, kv = randn(
            seed,
            (sum(query_lens), num_heads, self.head_dim),
            (sum(self.context_lens), 2, self.num_kv_heads, self.head_dim),
            dtype=dtype,
        )
        blocks, offsets = self.slots(block_table)
        kv_cache[blocks, :, offsets] = kv
        return PagedBatch(
            q=q,
            pool=pool,
            kv_cache=kv_cache,
            block_table=block_table,
            cu_seqlens=ints([sum(query_lens[:b]) for b in range(len(query_lens) + 1)]),
            context_lens=ints(self.context_lens),
        )

    def slots(self, block_table: Tensor) -> tuple[Tensor, Tensor]:
        """Block and offset of every token of every request, one after the other."""
        rows = [
            block_table[b].long().repeat_interleave(self.block_size)[:n]
            for b, n in enumerate(self.context_lens)
        ]
        offsets = [torch.arange(n, device=DEVICE) % self.block_size for n in self.context_lens]
        empty = ints([], torch.int64)
        return torch.cat([empty, *rows]), torch.cat([empty, *offsets])

    def _deal_blocks(self, seed: int) -> tuple[Tensor, int]:
        """Scattered blocks of a pool with three to spare; a garbage block where a row has ended."""
        needed = [-(-n // self.block_size) for n in self.context_lens]
        order = permutation(seed, sum(needed) + 3).int()
        width = max(needed, default=0) + seed % 3
        block_table = order[-1].repeat(len(needed), width)
        for b, n in enumerate(needed):
            block_table[b, :n] = order[sum(needed[:b]) : sum(needed[: b + 1])]
        return block_table, len(order)


@st.composite
def layouts(
    draw: st.DrawFn, prefill: bool = False, max_requests: int = 4, max_len: int = 300
) -> Layout:
    """Decode batches with padding rows, or prefill batches with cached prefixes."""
    block_size = draw(block_sizes)
    at_block_edge = st.builds(
        lambda n, d: max(1, n * block_size + d), st.integers(1, 4), st.sampled_from([-1, 0, 1])
    )
    lengths = at_block_edge | st.integers(1, max_len)
    if not prefill:
        lengths = lengths | st.just(0)
    context_lens = tuple(draw(st.lists(lengths, max_size=max_requests)))
    query_lens = None
    if prefill:
        query_lens = tuple(draw(st.just(n) | st.integers(1, n)) for n in context_lens)
    num_kv_heads, group = draw(heads)
    return Layout(
        context_lens=context_lens,
        query_lens=query_lens,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=draw(head_dims),
        block_size=block_size,
        num_layers=draw(st.integers(1, 3)),
        garbage=draw(st.sampled_from([float("nan"), float("inf"), 6e4])),
    )


def sparse_pool(folder: Path, num_blocks: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """[num_blocks, *shape] of zeros that takes memory only where it is written."""
    size = num_blocks * torch.Size(shape).numel()
    if DEVICE == "cuda":
        return torch.zeros(num_blocks, *shape, dtype=dtype, device=DEVICE)
    flat = torch.from_file(str(folder / "pool"), shared=True, size=size, dtype=dtype)
    return flat.view(num_blocks, *shape)
