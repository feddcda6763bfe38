"""Kernels that prefill would compile behind its warm-up, found on a machine without a GPU.

    python -m tests.compiled_late    ->    a JSON line per model and GPU

The workers' own warm-up is run, then launches of random chunks, all over tensors on the CPU, and
every kernel that Triton would compile stops there: what matters is which it asks for.
"""

import json
import math
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)  # read where @triton.jit decorates

import torch
import triton
from triton.runtime.jit import JITFunction

import kernels
from engine import prefill
from engine.decode import DecodeWorker
from engine.kv_cache import KVCache
from engine.prefill import PrefillWorker, Segment, token_buckets, warm_up_lengths
from experiments.shapes import write_config
from kernels import dependent_launch, hopper, tile
from kernels.tiles import TileKey, read_tiles
from models.config import ModelConfig
from models.decoder import Decoder
from models.weights import dummy_weights
from tests.compile_kernels import NUM_SMS, CrossDriver

CPU, DTYPE = torch.device("cpu"), torch.bfloat16
MAX_TOKENS, MAX_ROWS, BLOCK_SIZE = 16384, 300, 16
SMALL = {"num_hidden_layers": 1, "vocab_size": 40_000, "max_position_embeddings": MAX_TOKENS}
CASES = [("Qwen3-0.6B", gpu, MAX_TOKENS) for gpu in ("NVIDIA H200", "NVIDIA H100 80GB HBM3")]
CASES += [("Qwen3-4B", "NVIDIA H200", MAX_TOKENS)]
CASES += [("Qwen3-0.6B", "NVIDIA H200", 2048)]  # as many as a graph has, of few chunks
NUM_LAUNCHES = 400


@contextmanager
def compiling(gpu: str) -> Iterator[set[tuple[str, str]]]:
    """Within, launchers do as on this GPU, and what they would have compiled is in the set."""
    asked: set[tuple[str, str]] = set()
    tiles = read_tiles()

    def tuned_tile(kernel: str, shape: str, num_sms: int | None, _: object) -> kernels.Tile | None:
        return tiles.get(TileKey(gpu, kernel, shape, num_sms or 0))

    def ask(self: JITFunction, key: str, *_: object) -> None:
        asked.add((self.fn.__name__, key))

    triton.runtime.driver.set_active(CrossDriver())
    with (
        patch.object(hopper, "has_wgmma", lambda device: True),
        patch.object(dependent_launch, "has_dependent_launch", lambda device: True),
        patch.object(tile, "INTERPRETED_SMS", NUM_SMS),
        patch.object(import_module("kernels.linear"), "tuned_tile", tuned_tile),
        patch.object(JITFunction, "_do_compile", ask),
    ):
        yield asked


def workers(model: str, max_tokens: int, folder: Path) -> tuple[PrefillWorker, DecodeWorker]:
    """Those of an engine on one device, of one layer: all are alike."""
    config = ModelConfig.from_folder(write_config(model, folder, **SMALL))
    weights = dummy_weights(config, device=CPU, dtype=DTYPE)
    decoder = Decoder(config, weights, MAX_TOKENS, kernels)
    cache = KVCache(config, 4, BLOCK_SIZE, device=CPU, dtype=DTYPE)
    options = {"max_model_len": MAX_TOKENS, "graph_pool": None, "device": CPU}
    return (
        PrefillWorker(
            decoder,
            cache,
            decoder.buffers(max_tokens, MAX_ROWS),
            buckets=token_buckets(config, max_tokens),
            **options,
        ),
        DecodeWorker(
            decoder, cache, decoder.buffers(MAX_ROWS, MAX_ROWS, block_size=BLOCK_SIZE), **options
        ),
    )


def random_lengths(rng: random.Random, max_tokens: int) -> list[int]:
    """Of one launch's chunks: of all sizes, many short ones and few long ones alike."""
    bits = math.log2(max_tokens)
    most = int(2 ** rng.uniform(0, bits))
    room, lengths = int(2 ** rng.uniform(0, bits)), []
    while room > 0 and len(lengths) < MAX_ROWS:
        lengths.append(rng.randint(1, min(most, room)))
        room -= lengths[-1]
    return lengths


def compiled_late(model: str, gpu: str, max_tokens: int, sizes: Callable) -> list[list]:
    """Kernels that a launch asks for first, each with that launch's tokens and chunks. sizes: of
    the launches that warm up."""
    found = []
    one_layer, rng = Segment(range(1), True), random.Random(f"{model} {gpu}")
    with tempfile.TemporaryDirectory() as folder, compiling(gpu) as asked:
        worker, decode = workers(model, max_tokens, Path(folder))
        with patch.object(prefill, "warm_up_lengths", sizes):
            worker.warm_up()
        decode.warm_up()
        for _ in range(NUM_LAUNCHES):
            lengths, known = random_lengths(rng, max_tokens), set(asked)
            worker._compute(worker._padding_batch(lengths), one_layer)
            if late := sorted(name for name, _ in asked - known):
                found.append([late, sum(lengths), len(lengths)])
    return found


def powers_of_two(max_tokens: int, max_rows: int) -> list[list[int]]:
    """What does not suffice: one chunk, of a power of two of tokens."""
    return [[2**i] for i in range(max_tokens.bit_length())]


def main() -> None:
    for model, gpu, max_tokens in CASES:
        found = {
            sizes.__name__: compiled_late(model, gpu, max_tokens, sizes)
            for sizes in (warm_up_lengths, powers_of_two)
        }
        print(json.dumps({"model": model, "gpu": gpu, "max_tokens": max_tokens} | found))


if __name__ == "__main__":
    main()
