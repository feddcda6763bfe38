"""Every kernel once or twice on small, ragged shapes: what compute-sanitizer is run over.

    compute-sanitizer --tool memcheck  --error-exitcode 1 python -m tests.small_launches
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.small_launches

Results are not looked at: the property tests do that.
"""

import torch

import kernels
from tests.strategies import DEVICE, DTYPES, Layout, ints, randn

SIZES = (1, 17, 70, 200)  # tokens: each of the matrix products, none a whole number of tiles
N, INTERMEDIATE, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS = 192, 320, 64, 4, 2


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


def launch_attention(dtype: torch.dtype) -> None:
    """Ragged prompts with cached prefixes, then a token each, some of them padding."""
    heads = {"num_kv_heads": NUM_KV_HEADS, "group": NUM_HEADS // NUM_KV_HEADS}
    layout = {"head_dim": HEAD_DIM, **heads}
    prompts = Layout(context_lens=(5, 90, 64), query_lens=(5, 30, 64), **layout).build(dtype, 0)
    kernels.prefill_attention(
        prompts.q, *prompts.paging, prompts.cu_seqlens, prompts.context_lens, 64, prompts.scale
    )
    batch = Layout(context_lens=(1, 700, 0, 257), **layout).build(dtype, 1)
    for num_sms in (None, 2):
        kernels.decode_attention(
            batch.q, *batch.paging, batch.context_lens, batch.scale, num_sms=num_sms
        )
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
    for dtype in DTYPES:
        for num_tokens in SIZES:
            launch_products(num_tokens, dtype)
        launch_attention(dtype)
        launch_sampling(dtype)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"launched every kernel in {len(DTYPES)} dtypes on {DEVICE}")


if __name__ == "__main__":
    main()
