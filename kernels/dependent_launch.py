"""Programmatic dependent launch: a kernel's programs start while the kernel before it still runs.

On Hopper a launch may overlap the end of the one before it in the stream, or in a graph captured
from it. Each kernel here first lets its successor start, and then waits for its predecessor before
it touches anything that a kernel may have written or may still read.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Let the next kernel start; wait for the end of the one before, its writes seen."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@lru_cache(maxsize=64)
def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for a launch on `device`: PDL where the hardware has it."""
    if has_dependent_launch(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def has_dependent_launch(device: torch.device) -> bool:
    """Compute capability 9.0 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
