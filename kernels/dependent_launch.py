"""Programmatic dependent launch: a kernel's programs start while the kernel before it still runs.

On Hopper a launch may overlap the end of the one before it in the stream, or in a graph captured
from it. A kernel launched so lets its successor start, as a rule at once, and waits for its
predecessor before it touches anything that a kernel may have written or may still read. What no
kernel of this package writes, weights and the index tensors of a batch, may be read before the
wait: whoever writes such a tensor on the device does so by a copy, or some launches earlier.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let the next kernel start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait for the end of the kernel before, its writes seen."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Both at once: for a kernel that has nothing to do before its inputs are there."""
    let_next_start(PDL)
    wait_for_previous(PDL)


@lru_cache(maxsize=64)
def launch_options(device: torch.device, *, early: bool = True) -> dict[str, Any]:
    """Keyword arguments for a launch on `device`: PDL where the hardware has it. Not early: the
    kernel starts behind the one before, and the next behind it."""
    if early and has_dependent_launch(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def has_dependent_launch(device: torch.device) -> bool:
    """Compute capability 9.0 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
