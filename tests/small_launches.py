"""Every kernel a few times on small, ragged shapes: what compute-sanitizer is run over.

    compute-sanitizer --tool memcheck  --error-exitcode 1 python -m tests.small_launches
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.small_launches

Results are not looked at: the property tests do that. What takes its time is compiling, so that
there is one 16-bit dtype, and what differs by block size or by sharing tiles is launched in it
alone.
"""

import torch

import kernels
from tests.strategies import DEVICE, Layout, PagedBatch, ints, randn

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter has no bf16
SIZES = (1, 17, 70, 200)  # tokens: each of the matrix products, none a whole number of tiles
N, INTERMEDIATE, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS = 192, 320, 64, 4, 2
HEADS = {"num_kv_heads": NUM_KV_HEADS, "group": NUM_HEADS // NUM_KV_HEADS}
# of products whose tiles programs share: launcher, tokens, width, depth, SMs
SHARED = (("linear", 130, 1216, 320, 6), ("gate_up", 200, 640, 192, 4))
FORMS = ((64, 64), (128, 8), (256, 1))  # of attention: head dim, block size
FEW_QUERIES, MANY_QUERIES = ((5, 5), (90, 30), (64, 64)), ((200, 131), (70, 70))


def launch_products(num_tokens: int, dtype: torch.dtype) -> None:
    """Norms and matrix products, with everything that can be fused to them."""
    x, residual, weight = randn(0, (num_tokens, N), (num_tokens, N), (N,), dtype=dtype)
    kernels.rms_norm(x, weight, 1e-6)
    kernels.add_rms_norm(x, residual, weight, 1e-6)
    qkv, bias, gate_up, down = randn(
        1, (INTERMEDIATE, N), (INTERMEDIATE,), (2 * INTERMEDIATE, N), (N, INTERMEDIATE), dtype=dtype
    )
    for num_sms in (None, 3):
        kernels.linear(x, qkv, bias, rms_eps=1e-6, num_sms=num_sms)
        kernels.mlp(x, gate_up, down, 1e-6, out=x, num_sms=num_sms)


def launch_shared_products(dtype: torch.dtype) -> None:
    """Matrix products on so few SMs that their programs pass sums on, where Hopper has a kernel
    for it."""
    workspace = kernels.matmul_workspace(DEVICE)
    for name, num_tokens, width, depth, num_sms in SHARED:
        rows = 2 * width if name == "gate_up" else width
        x, weight = randn(0, (num_tokens, depth), (rows, depth), dtype=dtype)
        launcher = getattr(kernels, name)
        launcher(x, weight, rms_eps=1e-6, num_sms=num_sms, workspace=workspace)


def prefill(dtype: torch.dtype, lens: tuple[tuple[int, int], ...], **layout: int) -> None:
    """Ragged prompts, by their tokens and how many of those are not cached yet."""
    context_lens, query_lens = zip(*lens, strict=True)
    prompts = Layout(context_lens=context_lens, query_lens=query_lens, **HEADS, **layout)
    batch, longest = prompts.build(dtype, 0), max(query_lens)
    kernels.prefill_attention(
        batch.q, *batch.paging, batch.cu_seqlens, batch.context_lens, longest, batch.scale
    )


def decode(dtype: torch.dtype, num_sms: int | None = None, **layout: int) -> PagedBatch:
    """A token of each request, one of them a padding row; returns the batch."""
    batch = Layout(context_lens=(1, 700, 0, 257), **HEADS, **layout).build(dtype, 1)
    kernels.decode_attention(
        batch.q, *batch.paging, batch.context_lens, batch.scale, num_sms=num_sms
    )
    return batch


def launch_attention(dtype: torch.dtype) -> None:
    """Attention, what stores a step's keys and values before it, and the move of blocks."""
    for lens in FEW_QUERIES, MANY_QUERIES:
        prefill(dtype, lens, head_dim=HEAD_DIM)
    decode(dtype, num_sms=2, head_dim=HEAD_DIM)
    batch = decode(dtype, head_dim=HEAD_DIM)
    num_tokens = 9
    qkv, norm = randn(
        2, (num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM), (HEAD_DIM,), dtype=dtype
    )
    positions = torch.arange(num_tokens, device=DEVICE)
    (cos_sin,) = randn(3, (num_tokens, HEAD_DIM), dtype=torch.float32)
    slots = torch.where(positions == 4, -1, positions * 3)  # one token that is not stored
    kernels.rope_store(qkv, positions, cos_sin, slots, batch.kv_cache, norm, norm, 1e-6)
    kernels.copy_blocks(
        batch.pool, batch.pool, ints([0, 2], torch.int64), ints([1, 3], torch.int64)
    )


def launch_sampling(dtype: torch.dtype) -> None:
    """A row of each kind."""
    (logits,) = randn(4, (4, 5003), dtype=dtype)
    kernels.sample(
        logits,
        ints([0.0, 0.7, 1.0, 1.3], torch.float32),
        ints([0, 20, 0, 3]),
        ints([1.0, 1.0, 0.9, 0.8], torch.float32),
        ints([0.0, 0.0, 0.0, 0.05], torch.float32),
        ints([1, 2, 3, 4], torch.int64),
        ints([0, 1, 2, 3]),
    )


def main() -> None:
    for dtype in (HALF, torch.float32):
        for num_tokens in SIZES:
            launch_products(num_tokens, dtype)
        launch_attention(dtype)
        launch_sampling(dtype)
    launch_shared_products(HALF)
    for head_dim, block_size in FORMS:
        prefill(HALF, MANY_QUERIES, head_dim=head_dim, block_size=block_size)
        decode(HALF, head_dim=head_dim, block_size=block_size)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"launched every kernel in two dtypes on {DEVICE}")


if __name__ == "__main__":
    main()
