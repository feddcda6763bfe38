"""The engine: prompts in, text out, through our own kernels, scheduler and paged KV cache."""

from engine.llm import LLM
from engine.request import SamplingParams

__all__ = ["LLM", "SamplingParams"]
