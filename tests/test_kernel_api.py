"""What callers may rely on: one signature per op, errors that name both sides, quiet imports."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kernels
from kernels import Tile, reference
from tests.strategies import DEVICE, ints

OPS = [
    "rms_norm",
    "add_rms_norm",
    "linear",
    "gate_up",
    "mlp",
    "rope_store",
    "row_rstd",
    "prefill_attention",
    "decode_attention",
    "copy_blocks",
    "sample",
    "decode_workspace",
    "matmul_workspace",
    "sample_workspace",
]
LAUNCH_ONLY = {"out", "tile", "num_sms", "workspace"}


def parameters(function: Callable) -> list[inspect.Parameter]:
    """What a caller passes, less how the launch is done and the annotations."""
    return [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in LAUNCH_ONLY
    ]


@pytest.mark.parametrize("name", OPS)
def test_launcher_and_reference_have_one_signature(name):
    launcher, twin = getattr(kernels, name), getattr(reference, name)
    assert parameters(launcher) == parameters(twin)
    ours, theirs = inspect.signature(launcher).parameters, inspect.signature(twin).parameters
    assert ("out" in ours) == ("out" in theirs)
    for parameter in ours.values():
        if parameter.name in LAUNCH_ONLY:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default is None


def test_every_reference_has_a_launcher():
    public = inspect.getmembers(reference, inspect.isfunction)
    names = {name for name, f in public if f.__module__ == reference.__name__ and name[0] != "_"}
    assert names - {"uniform"} == set(OPS)  # the number has no launch of its own


IMPORT = """
import os, random, sys
import torch
before = dict(os.environ), torch.initial_seed(), torch.get_default_dtype(), torch.get_num_threads()
import kernels
after = dict(os.environ), torch.initial_seed(), torch.get_default_dtype(), torch.get_num_threads()
assert before == after
assert not torch.cuda.is_initialized()
assert not hasattr(kernels, "__version__")  # transformers looks for a package of this name
ours = {"engine", "models", "green", "experiments", "tests"}
assert not ours & set(sys.modules), ours & set(sys.modules)
"""


def test_import_has_no_side_effect():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_reference_imports_only_torch():
    assert {name for name, m in vars(reference).items() if inspect.ismodule(m)} == {"math", "torch"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_torch_empty_is_poisoned_in_tests(dtype):
    """Else a lane that a kernel forgets could hold the right value from a test before."""
    x = torch.ones(3, 5, dtype=dtype, device=DEVICE)
    for empty in (torch.empty(7, dtype=dtype, device=DEVICE), torch.empty_like(x), x.new_empty(4)):
        assert empty.isnan().all()
    assert (torch.empty(4, dtype=torch.int32, device=DEVICE) == 2**31 - 1).all()


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, device=DEVICE)


KV = (4, 2, 16, 2, 32)  # num_blocks, k and v, block_size, H_KV, D
TABLE, LENS = (2, 3), (2,)


def prefill(
    q: tuple = (5, 4, 32), kv: tuple = KV, table: tuple = TABLE, cu: tuple = (3,),
    cu_of: Tensor | None = None, lens_of: Tensor | None = None, **options: Tensor,
) -> Tensor:  # fmt: skip
    cu_seqlens = zeros(*cu).int() if cu_of is None else cu_of
    lens = zeros(2).int() if lens_of is None else lens_of
    return kernels.prefill_attention(
        zeros(*q), zeros(*kv), zeros(*table).int(), cu_seqlens, lens, 3, 1.0, **options
    )


def decode(
    q: tuple = (2, 4, 32), kv: tuple = KV, table: tuple = TABLE, lens: tuple = LENS,
    lens_of: Tensor | None = None, **options,
) -> Tensor:  # fmt: skip
    context_lens = zeros(*lens).int() if lens_of is None else lens_of
    return kernels.decode_attention(
        zeros(*q), zeros(*kv), zeros(*table).int(), context_lens, 1.0, **options
    )


def rope(
    qkv: tuple = (3, 256), positions: int = 3, slots: int = 3, cos_sin: int = 32, kv: tuple = KV,
    angles_of: Tensor | None = None, **options,
) -> Tensor:  # fmt: skip
    angles = zeros(8, cos_sin) if angles_of is None else angles_of
    return kernels.rope_store(
        zeros(*qkv), zeros(positions).long(), angles, zeros(slots).long(), zeros(*kv), **options
    )


def sample(**replaced: Tensor) -> Tensor:
    arguments = {
        "logits": zeros(2, 9),
        "temperature": zeros(2),
        "top_k": zeros(2).int(),
        "top_p": zeros(2) + 1,
        "min_p": zeros(2),
        "seeds": zeros(2).long(),
        "steps": zeros(2).int(),
    }
    return kernels.sample(**(arguments | replaced))


# made when called: what is collected is collected by every worker, and takes no GPU
def x() -> Tensor:
    return zeros(3, 8)


def w() -> Tensor:
    return zeros(8)


def every_other() -> Tensor:
    return zeros(3, 16)[:, ::2]


def strided_ints(length: int) -> Tensor:
    return zeros(2 * length).int()[::2]


def less(workspace: kernels.DecodeWorkspace) -> kernels.DecodeWorkspace:
    """As of one kv head fewer, where all else is the same."""
    return replace(workspace, taken=workspace.taken[1:])


MISTAKES = {
    "norm weight": (lambda: kernels.rms_norm(x(), zeros(7), 0.0), "weight must be [8], got [7]"),
    "norm x": (
        lambda: kernels.rms_norm(every_other(), w(), 0.0),
        "x must be contiguous in its last",
    ),
    "norm out": (
        lambda: kernels.rms_norm(x(), w(), 0.0, out=zeros(3, 7)),
        "out must be [3, 8], got",
    ),
    "add residual": (
        lambda: kernels.add_rms_norm(x(), zeros(2, 8), w(), 0.0),
        "residual must be [3, 8], got [2, 8]",
    ),
    "linear weight": (
        lambda: kernels.linear(x(), zeros(4, 7)),
        "weight must be [4, 8], got [4, 7]",
    ),
    "linear x": (lambda: kernels.linear(every_other(), zeros(4, 8)), "x must be contiguous"),
    "linear bias": (
        lambda: kernels.linear(x(), zeros(4, 8), zeros(5)),
        "bias must be [4], got [5]",
    ),
    "linear residual": (
        lambda: kernels.linear(x(), zeros(4, 8), residual=zeros(3, 5)),
        "residual must be [3, 4], got [3, 5]",
    ),
    "row_rstd x": (
        lambda: kernels.row_rstd(every_other(), 0.0),
        "x must be contiguous in its last",
    ),
    "row_rstd out": (lambda: kernels.row_rstd(x(), 0.0, out=zeros(4)), "out must be [3], got [4]"),
    "linear out": (
        lambda: kernels.linear(x(), zeros(4, 8), out=zeros(3, 5)),
        "out must be [3, 4], got [3, 5]",
    ),
    "gate_up weight": (
        lambda: kernels.gate_up(x(), zeros(5, 8)),
        "weight must be [2 * I, 8], got [5, 8]",
    ),
    "mlp gate_up_weight": (
        lambda: kernels.mlp(x(), zeros(4, 7), zeros(8, 2), 1e-6),
        "weight must be [2 * I, 8], got [4, 7]",
    ),
    "mlp down_weight": (
        lambda: kernels.mlp(x(), zeros(4, 8), zeros(8, 3), 1e-6),
        "weight must be [8, 2], got [8, 3]",
    ),
    "rope qkv": (lambda: rope(qkv=(3, 250)), "qkv must be [T, (H + 2 * 2) * 32], got [3, 250]"),
    "rope positions": (lambda: rope(positions=2), "positions must be [3], got [2]"),
    "rope slots": (lambda: rope(slots=4), "slot_mapping must be [3], got [4]"),
    "rope cos_sin": (lambda: rope(cos_sin=16), "cos_sin must be [8, 32], got [8, 16]"),
    "rope one norm": (lambda: rope(q_norm_weight=zeros(32)), "or neither, got q_norm_weight"),
    "rope pair": (lambda: rope(kv=(4, 1, 16, 2, 32)), "kv_cache must be [4, 2, 16, 2, 32], got"),
    "rope strided cos_sin": (
        lambda: rope(angles_of=zeros(32, 8).T),
        "cos_sin must be contiguous in its last dim, got stride (1, 8)",
    ),
    "row_rstd strided out": (
        lambda: kernels.row_rstd(x(), 0.0, out=zeros(6)[::2]),
        "out must be contiguous in its last dim, got stride (2,)",
    ),
    "row_rstd out of another dtype": (
        lambda: kernels.row_rstd(x(), 0.0, out=zeros(3).half()),
        "out must be torch.float32, got torch.float16",
    ),
    "linear rstd of another dtype": (
        lambda: kernels.linear(x(), zeros(4, 8), rms_eps=1e-6, rstd=zeros(3).half()),
        "rstd must be torch.float32, got torch.float16",
    ),
    "linear rstd": (
        lambda: kernels.linear(x(), zeros(4, 8), rms_eps=1e-6, rstd=zeros(2)),
        "rstd must be [3], got [2]",
    ),
    "linear tile": (
        lambda: kernels.linear(x(), zeros(4, 8), tile=Tile(BLOCK_M=64, BLOCK_N=96, BLOCK_K=64)),
        "a power of 2 of columns for these operands, got Tile(BLOCK_M=64, BLOCK_N=96",
    ),
    "rope out": (lambda: rope(out=zeros(3, 4, 16)), "out must be [3, 4, 32], got [3, 4, 16]"),
    "prefill heads": (lambda: prefill(q=(5, 3, 32)), "q must have a multiple of 2 heads, got 3"),
    "prefill D": (lambda: prefill(q=(5, 4, 16)), "kv_cache must be [4, 2, 16, 2, 16], got"),
    "prefill cu_seqlens": (lambda: prefill(cu=(4,)), "cu_seqlens must be [3], got [4]"),
    "prefill table": (lambda: prefill(table=(3, 3)), "block_table must be [2, 3], got [3, 3]"),
    "prefill out": (lambda: prefill(out=zeros(4, 4, 32)), "out must be [5, 4, 32], got"),
    "decode heads": (lambda: decode(q=(2, 3, 32)), "q must have a multiple of 2 heads, got 3"),
    "decode lens": (lambda: decode(lens=(3,)), "context_lens must be [2], got [3]"),
    "decode table": (lambda: decode(table=(1, 3)), "block_table must be [2, 3], got [1, 3]"),
    "decode workspace": (
        lambda: decode(workspace=kernels.decode_workspace(2, 2, 32, DEVICE)),
        ", >= 4, 2, 32] sums, got [",
    ),
    "decode strided lens": (
        lambda: decode(lens_of=strided_ints(2)),
        "context_lens must be contiguous in its last dim, got stride (2,)",
    ),
    "decode workspace of fewer kv heads": (
        lambda: decode(workspace=less(kernels.decode_workspace(4, 2, 32, DEVICE))),
        "workspace must be for 2 kv heads or more, got 1",
    ),
    "prefill strided cu_seqlens": (
        lambda: prefill(cu_of=strided_ints(3)),
        "cu_seqlens must be contiguous in its last dim, got stride (2,)",
    ),
    "prefill strided lens": (
        lambda: prefill(lens_of=strided_ints(2)),
        "context_lens must be contiguous in its last dim, got stride (2,)",
    ),
    "copy strided src_ids": (
        lambda: kernels.copy_blocks(zeros(3, 4), zeros(3, 4), strided_ints(2), ints([0, 1])),
        "src_ids must be contiguous in its last dim, got stride (2,)",
    ),
    "copy strided dst_ids": (
        lambda: kernels.copy_blocks(zeros(3, 4), zeros(3, 4), ints([0, 1]), strided_ints(2)),
        "dst_ids must be contiguous in its last dim, got stride (2,)",
    ),
    "sample strided temperature": (
        lambda: sample(temperature=zeros(4)[::2]),
        "temperature must be contiguous in its last dim, got stride (2,)",
    ),
    "sample one seed for all": (
        lambda: sample(seeds=zeros(1).long().expand(2)),
        "seeds must be contiguous in its last dim, got stride (0,)",
    ),
    "sample strided out": (
        lambda: sample(out=zeros(4).long()[::2]),
        "out must be contiguous in its last dim, got stride (2,)",
    ),
    "copy dst": (
        lambda: kernels.copy_blocks(zeros(3, 4), zeros(3, 5), ints([0]), ints([0])),
        "dst must be [3, 4], got [3, 5]",
    ),
    "copy ids": (
        lambda: kernels.copy_blocks(zeros(3, 4), zeros(3, 4), ints([0]), ints([0, 1])),
        "dst_ids must be [1], got [2]",
    ),
    "copy dtype": (
        lambda: kernels.copy_blocks(zeros(3, 4), zeros(3, 4).half(), ints([0]), ints([0])),
        "dst must be torch.float32, got torch.float16",
    ),
    "sample top_k": (lambda: sample(top_k=zeros(3).int()), "top_k must be [2], got [3]"),
    "sample logits": (lambda: sample(logits=zeros(2, 9)[:, ::2]), "logits must be contiguous"),
    "sample workspace": (
        lambda: sample(workspace=kernels.sample_workspace(1, 9, DEVICE)),
        "workspace must hold [>= 2, 1] pieces, got [1, 1]",
    ),
    "sample out": (lambda: sample(out=zeros(3).long()), "out must be [2], got [3]"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    call, message = MISTAKES[name]
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)
