"""Decode steps without an engine: random KV blocks for requests, and workers launched by hand."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from engine.decode import DecodeWorker
from engine.graphs import GraphPool
from engine.kv_cache import KVCache
from engine.micro_batches import num_rows
from engine.request import Request, SamplingParams
from kernels import reference
from models.config import ModelConfig
from models.decoder import Decoder
from models.weights import load_weights
from tests.strategies import DEVICE, bits

MAX_MODEL_LEN = 64  # tokens; on a CPU requests are short
ROOM = 12  # steps that a request has blocks for


def _by_row(launcher: Any) -> Any:
    """The launcher a row at a time: a product of several rows may sum up in another order."""

    def launch(x: Tensor, *arguments: Any, out: Tensor | None = None, **options: Any) -> Tensor:
        residual = None
        if len(arguments) > 2:  # linear's weight, bias, residual
            *arguments, residual = arguments
        options = {k: v for k, v in options.items() if k not in ("rstd", "act")}
        rows = []
        for i in range(len(x)):
            more = [] if residual is None else [residual[i : i + 1]]
            rows.append(launcher(x[i : i + 1], *arguments, *more, **options))
        y = torch.cat(rows)
        return y if out is None else out.copy_(y)

    return launch


def row_by_row() -> SimpleNamespace:
    """The references, but a row's result does not depend on how many others there are."""
    ops = {name: getattr(reference, name) for name in dir(reference) if not name.startswith("_")}
    for name in ("linear", "rms_norm"):
        ops[name] = _by_row(ops[name])

    def mlp(x: Tensor, gate_up: Tensor, down: Tensor, eps: float, **options: Any) -> Tensor:
        rows = [reference.mlp(x[i : i + 1], gate_up, down, eps) for i in range(len(x))]
        return options["out"].copy_(torch.cat(rows))

    return SimpleNamespace(**ops | {"mlp": mlp})


def decoder_of(folder: Path, ops: Any) -> Decoder:
    config = ModelConfig.from_folder(folder)
    weights = load_weights(config, folder, device=DEVICE, dtype=torch.float32)
    return Decoder(config, weights, MAX_MODEL_LEN, ops)


def random_cache(decoder: Decoder, num_tokens: int, block_size: int, seed: int) -> KVCache:
    """Room for so many tokens, every block with random values, the same for a seed."""
    embedding = decoder.weights.embedding
    options = {"device": embedding.device, "dtype": embedding.dtype}
    cache = KVCache(decoder.config, -(-num_tokens // block_size), block_size, **options)
    generator = torch.Generator(embedding.device).manual_seed(seed)
    cache.blocks.normal_(generator=generator)
    return cache


SAMPLERS = [
    SamplingParams(temperature=0.0, logprobs=2),
    SamplingParams(seed=1, temperature=0.9),
    SamplingParams(seed=2, top_k=5, logprobs=0),
    SamplingParams(seed=3, top_p=0.8),
]


class Steps:
    """Requests over one worker. A new one for each worker, from the same lengths and seed."""

    def __init__(self, worker: DecodeWorker, context_lens: Sequence[int], seed: int) -> None:
        """context_lens: tokens of each request, the newest not yet in the cache."""
        self.worker = worker
        generator = torch.Generator().manual_seed(seed)
        kv_cache = worker.kv_cache
        free = torch.randperm(kv_cache.num_blocks, generator=generator).tolist()
        vocab_size = worker.decoder.config.vocab_size
        self.requests, self.tables = [], {}
        for i, length in enumerate(context_lens):
            token_ids = torch.randint(vocab_size, (length,), generator=generator).tolist()
            request = Request(i, token_ids, SAMPLERS[i % len(SAMPLERS)], seed=i)
            self.requests.append(request)
            num_blocks = -(-(length + ROOM) // kv_cache.block_size)
            self.tables[i] = [free.pop() for _ in range(num_blocks)]
        worker.admit(self.requests)

    def step(self, requests: Sequence[Request] | None = None) -> tuple[list[int], list[Any]]:
        """A token for each, and what was asked for of its log-probabilities."""
        requests = self.requests if requests is None else requests
        for request in requests:
            request.num_in_flight += 1
        launched = self.worker.launch(requests, self.tables.__getitem__)
        token_ids = launched.wait()
        logprobs = [launched.logprobs_of(i, t) for i, t in enumerate(token_ids)]
        for request, token_id in zip(requests, token_ids, strict=True):
            request.num_in_flight -= 1
            request.token_ids.append(token_id)
        return token_ids, logprobs

    def cached(self) -> list[Tensor]:
        """The bits of every request's blocks."""
        blocks = self.worker.kv_cache.blocks
        return [bits(blocks[self.tables[request.request_id]]) for request in self.requests]


def worker_options(
    decoder: Decoder,
    seed: int,
    max_num_seqs: int,
    num: int = 2,
    *,
    block_size: int = 4,
    max_model_len: int = MAX_MODEL_LEN,
    graph_pool: GraphPool | None = None,
) -> dict[str, Any]:
    """Arguments of a worker for steps of so many requests, in num micro-batches at most."""
    rows = num_rows(max_num_seqs, num)
    return {
        "decoder": decoder,
        "kv_cache": random_cache(decoder, max_num_seqs * max_model_len, block_size, seed),
        "buffers": decoder.buffers(rows, rows, block_size=block_size),
        "max_model_len": max_model_len,
        "graph_pool": graph_pool,
        "device": torch.device(DEVICE),
    }
