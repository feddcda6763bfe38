"""Compile every kernel for sm_90, as its launcher would launch it, on a machine without a GPU.

    python -m tests.compile_kernels [--jobs N]    ->    one JSON line per compiled kernel

The launchers themselves are called, with tensors that nothing reads: a driver that only names the
target stands in for CUDA's, and every launch stops behind its compilation.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)  # read where @triton.jit decorates

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

import kernels
from kernels import dependent_launch, hopper, tall_matmul, tall_plan
from kernels.rope_store import MANY_TOKENS
from kernels.thin_matmul import launch_thin_matmul
from kernels.tiles import read_tiles

NUM_SMS = 132
DECODE_BATCHES = (1, 16, 64, 256)
PREFILL_TOKENS = 2048
MATMUL_SHAPE = r"M=(\d+) N=(\d+) K=(\d+)( residual)?"  # what kernels.tiles.matmul_shape makes
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ATTENTION_BATCH = 16


@dataclass(frozen=True)
class Model:
    """The shapes that decide how kernels are specialised."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int


MODELS = {
    "smollm2-135m": Model(576, 9, 3, 64, 1536, 49152),
    "qwen3-0.6b": Model(1024, 16, 8, 128, 3072, 151936),
    "qwen3-8b": Model(4096, 32, 8, 128, 12288, 151936),
}
# attention alone is specialised for these: head dims beside groups, each with block sizes
HEADS = {
    "heads-of-64": Model(0, 3, 1, 64, 0, 0),
    "heads-of-128": Model(0, 40, 8, 128, 0, 0),
    "heads-of-256": Model(0, 8, 4, 256, 0, 0),
}
BLOCK_SIZES = {
    "heads-of-64": (1, 8, 64),
    "heads-of-128": (1, 8, 32, 64),
    "heads-of-256": (1, 16),
}


class CrossDriver:
    """The part of Triton's driver that compiling needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def launch_rows(m: Model, T: int, dtype: torch.dtype) -> None:
    """What both phases launch over T tokens: all but attention and sampling."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    x, norm = new(T, m.hidden), new(m.hidden)
    kernels.rms_norm(x, norm, 1e-6)
    kernels.add_rms_norm(x, new(T, m.hidden), norm, 1e-6)
    heads = m.num_heads + 2 * m.num_kv_heads
    qkv_weight = new(heads * m.head_dim, m.hidden)
    o_weight = new(m.hidden, m.num_heads * m.head_dim)
    down_weight, lm_head = new(m.hidden, m.intermediate), new(m.vocab_size, m.hidden)
    gate_up_weight = new(2 * m.intermediate, m.hidden)
    for num_sms in (None, NUM_SMS):
        kernels.linear(x, qkv_weight, rms_eps=1e-6, num_sms=num_sms)
        kernels.linear(new(T, o_weight.shape[1]), o_weight, residual=x, out=x, num_sms=num_sms)
        kernels.mlp(x, gate_up_weight, down_weight, 1e-6, out=x, num_sms=num_sms)
    kernels.linear(x, qkv_weight, new(len(qkv_weight)), rms_eps=1e-6)
    kernels.linear(x, lm_head)
    launch_rope(m, T, dtype)


def launch_rope(m: Model, T: int, dtype: torch.dtype) -> None:
    """With and without norms of queries and keys."""
    heads = m.num_heads + 2 * m.num_kv_heads
    qkv, norm = (
        torch.empty(T, heads * m.head_dim, dtype=dtype),
        torch.empty(m.head_dim, dtype=dtype),
    )
    for norms in ((), (norm, norm, 1e-6)):
        kernels.rope_store(
            qkv, ints(T, dtype=torch.int64), torch.empty(4096, m.head_dim),
            ints(T, dtype=torch.int64), kv_pool(m, dtype)[:, 1], *norms,
        )  # fmt: skip


def kv_pool(m: Model, dtype: torch.dtype, block_size: int = 16) -> Tensor:
    return torch.empty(64, 4, 2, block_size, m.num_kv_heads, m.head_dim, dtype=dtype)


def as_on_other_gpus() -> AbstractContextManager[object]:
    """Within, launchers go without what Hopper alone has."""
    return patch.object(hopper, "has_wgmma", lambda device: False)


def launch_decode(m: Model, B: int, dtype: torch.dtype) -> None:
    launch_rows(m, B, dtype)
    if m is MODELS["smollm2-135m"]:  # one model stands for all, as the kernels are slow to compile
        with as_on_other_gpus():
            launch_rows(m, B, dtype)
    q = torch.empty(B, m.num_heads, m.head_dim, dtype=dtype)
    args = q, kv_pool(m, dtype)[:, 1], ints(B, 256), ints(B), 0.1
    kernels.decode_attention(*args, num_sms=NUM_SMS)
    with as_on_other_gpus():
        kernels.decode_attention(*args, num_sms=NUM_SMS)
    per_row = torch.empty(B)
    for logits in (torch.empty(B, m.vocab_size, dtype=dtype), torch.empty(B, m.vocab_size)):
        kernels.sample(
            logits, per_row, ints(B), per_row, per_row, ints(B, dtype=torch.int64), ints(B)
        )


def launch_prefill(m: Model, T: int, dtype: torch.dtype) -> None:
    launch_rows(m, T, dtype)
    launch_rope(m, MANY_TOKENS, dtype)

    def attend(max_query_len: int) -> None:
        kernels.prefill_attention(
            torch.empty(T, m.num_heads, m.head_dim, dtype=dtype), kv_pool(m, dtype)[:, 1],
            ints(4, 256), ints(5), ints(4), max_query_len, 0.1,
        )  # fmt: skip

    attend(T)
    with as_on_other_gpus():
        for max_query_len in (64, T):  # a short chunk and a long prompt
            attend(max_query_len)
    pool = kv_pool(m, dtype)
    kernels.copy_blocks(pool, pool, ints(8, dtype=torch.int64), ints(8, dtype=torch.int64))


def launch_attention(m: Model, block_size: int, dtype: torch.dtype) -> None:
    """Decode and prefill over blocks of a size."""
    kv_cache = kv_pool(m, dtype, block_size)[:, 1]
    q = torch.empty(PREFILL_TOKENS, m.num_heads, m.head_dim, dtype=dtype)
    few, B = q[:ATTENTION_BATCH], ATTENTION_BATCH
    kernels.decode_attention(few, kv_cache, ints(B, 256), ints(B), 0.1)
    table, starts, lens = ints(4, 256), ints(5), ints(4)
    kernels.prefill_attention(q, kv_cache, table, starts, lens, PREFILL_TOKENS, 0.1)


def launch_tall(m: Model, T: int, dtype: torch.dtype) -> None:
    """Every tile that `tall_matmul` may choose, whole and shared, whatever the shapes lead to."""
    x, weight = torch.empty(T, m.hidden, dtype=dtype), torch.empty(T, m.hidden, dtype=dtype)
    out, bias = torch.empty(T, T, dtype=dtype), torch.empty(T, dtype=dtype)
    for tile, _ in tall_plan.PLAIN_TILES:
        kernels.linear(x, weight, tile=tile)
        kernels.linear(x, weight, bias, out, 1e-6, out=out, tile=tile)
    for tile, _ in tall_plan.GATED_TILES:
        kernels.gate_up(x, weight, tile=tile)
        kernels.gate_up(x, weight, 1e-6, tile=tile)
    scratch = kernels.MatmulWorkspace(torch.empty(NUM_SMS, 1), ints(NUM_SMS, 2))
    for side in range(2, tall_plan.MAX_SIDE + 1):  # a plan has no rows of one program
        with sharing(tall_plan.PLAIN_TILES[0][0], side):
            kernels.linear(x, weight, bias, rms_eps=1e-6, workspace=scratch)
            kernels.linear(x, weight, bias, out, out=out, workspace=scratch)
            kernels.linear(x, weight, None, out, 1e-6, out=out, workspace=scratch)
        with sharing(tall_plan.GATED_TILES[0][0], side):
            kernels.gate_up(x, weight, 1e-6, workspace=scratch)


def sharing(tile: kernels.Tile, side: int) -> AbstractContextManager[object]:
    """Within, programs share tiles, whatever the shape."""
    plan = tall_plan.Plan(tile, side)
    return patch.object(tall_matmul, "choose_plan", lambda *shape, **options: plan)


def launch_squeezed(m: Model, T: int, dtype: torch.dtype) -> None:
    """A tile far too large for its warps, which must spill: that the measure can fail."""
    tile = kernels.Tile(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=4)
    x, weight = torch.empty(T, m.hidden, dtype=dtype), torch.empty(T, m.hidden, dtype=dtype)
    out = torch.empty(T, T, dtype=dtype)
    launch_thin_matmul(x, weight, None, None, None, out, gated=False, tile=tile, num_sms=None)


def launch_tiles(m: Model, T: int, dtype: torch.dtype) -> None:
    """Whatever tiles.json holds, whichever model it is of."""
    for key, tile in read_tiles().items():
        num_tokens, width, depth, residual = re.fullmatch(MATMUL_SHAPE, key.shape).groups()
        launcher = getattr(kernels, key.kernel)
        rows = int(width) * (2 if key.kernel == "gate_up" else 1)
        x = torch.empty(int(num_tokens), int(depth), dtype=dtype)
        weight = torch.empty(rows, int(depth), dtype=dtype)
        out = torch.empty(int(num_tokens), int(width), dtype=dtype)
        extra = {"residual": out} if residual else {"rms_eps": 1e-6}
        launcher(x, weight, **extra, out=out, tile=tile, num_sms=key.num_sms or None)


LAUNCHES = {
    "decode": launch_decode,
    "prefill": launch_prefill,
    "attention": launch_attention,
    "tall": launch_tall,
    "tiles": launch_tiles,
    "squeezed": launch_squeezed,
}


def cases() -> list[tuple[str, str, str, int]]:
    """Model, dtype, phase, rows (attention: tokens of a block). fp16 for one model: only its fused
    norm differs; fp32 for attention, whose tiles would not fit."""
    sizes = [("prefill", PREFILL_TOKENS)] + [("decode", B) for B in DECODE_BATCHES]
    kinds = [(model, "bf16") for model in MODELS] + [("qwen3-0.6b", "fp16")]
    extra = [
        ("qwen3-0.6b", "bf16", phase, PREFILL_TOKENS) for phase in ("squeezed", "tall", "tiles")
    ]
    for name, sizes_of_block in BLOCK_SIZES.items():
        extra += [(name, "bf16", "attention", size) for size in sizes_of_block]
        extra += [(name, "fp32", "attention", 16)]
    return extra + [(model, dtype, phase, n) for phase, n in sizes for model, dtype in kinds]


def compile_case(case: tuple[str, str, str, int]) -> list[dict]:
    """One report per kernel that this case launches."""
    model, dtype, phase, n = case
    origin = {"model": model, "dtype": dtype, "phase": phase, "rows": n}
    reports = []

    def stop_behind_compilation(run: Callable) -> Callable:
        def wrapper(self: JITFunction, *args: object, grid: tuple, warmup: bool, **kwargs: object):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
            reports.append(origin | report(kernel))
            return kernel

        return wrapper

    run = JITFunction.run
    triton.runtime.driver.set_active(CrossDriver())
    dependent_launch.has_dependent_launch = hopper.has_wgmma = lambda device: True
    JITFunction.run = stop_behind_compilation(run)
    try:
        LAUNCHES[phase]((MODELS | HEADS)[model], n, DTYPES[dtype])
    finally:
        JITFunction.run = run
    return reports


reported = {}  # by the kernel's hash: many cases differ in nothing that a compiler sees


def report(kernel: CompiledKernel) -> dict:
    """What the compiled kernel takes. Spills are what its SASS moves to local memory and back: of
    none where it has no such memory, which is known without half a second for the SASS."""
    if kernel.hash not in reported:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            usage = cuobjdump("-res-usage", cubin.name)
            stack_bytes, local_bytes = (
                int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("STACK", "LOCAL")
            )
            sass = cuobjdump("-sass", cubin.name) if stack_bytes or local_bytes else ""
        reported[kernel.hash] = {
            "kernel": kernel.metadata.name,
            "constexprs": constexprs(kernel.src),
            "num_warps": kernel.metadata.num_warps,
            "num_stages": kernel.metadata.num_stages,
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "stack_bytes": stack_bytes,
            "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
            "shared_bytes": kernel.metadata.shared,
            "wgmma": "wgmma.mma_async" in kernel.asm["ptx"],  # ptxas has nothing else for it
        }
    return reported[kernel.hash]


def constexprs(source: ASTSource) -> dict[str, int | str]:
    """The launch choices by name, less the arguments that Triton itself found to be 1 or None."""
    names = source.fn.arg_names
    values = {names[path[0]]: value for path, value in source.constants.items()}
    return {name: value for name, value in values.items() if name.isupper() and len(name) > 1}


def cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    jobs = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # a fresh compile, shared by the processes
        with ProcessPoolExecutor(jobs) as pool:
            for reports in pool.map(compile_case, cases()):
                for line in reports:
                    print(json.dumps(line))


if __name__ == "__main__":
    sys.exit(main())
