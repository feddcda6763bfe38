"""PrefillWorker: prompts to KV blocks and first tokens, on one device.

Kernel by kernel, the host takes longer to launch a short prompt than the device to compute it.
Such launches are padded to a bucket of tokens and a fixed number of chunks, and are one CUDA graph
from embedding to drawn token. Padding is inert: a padding token is stored nowhere and belongs to no
request, so that attention neither reads nor writes its row, and all other kernels keep to rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.base_scheduler import PrefillChunk
from engine.batch import (
    PREFILL,
    SAMPLING,
    BlockTableOf,
    Launched,
    PrefillBatch,
    prefill_columns,
    sampled_requests,
)
from engine.graphs import GraphPool, StaticInputs, StepGraphs
from engine.kv_cache import KVCache
from models.config import ModelConfig
from models.decoder import Decoder, StageBuffers

# Up to some 256 tokens a launch is bound by reading the weights and padding costs little; behind
# that, steps of at most a half. Each bucket costs start-up time: no more than ten.
TOKEN_BUCKETS = (16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)

# What an H100 computes while the host launches the seven kernels of a layer, some 0.35 ms. Where a
# layer takes more, the host is no longer what is waited for, and padding would only cost.
LAUNCH_FLOPS = 2e11

# Attention has a program for each head, row and tile of the bucket, most of which leave at once:
# with 8 rows at most 2048 on the Qwen3 family, some microseconds a layer. More rows cost more for
# launches that seldom come: it takes as many prompts arriving within one step.
GRAPH_ROWS = 8


def token_buckets(config: ModelConfig, max_num_batched_tokens: int) -> list[int]:
    """Token counts that get a graph, rising; a launch that exceeds the last is launched eagerly."""
    q_size = config.num_heads * config.head_dim
    width = config.qkv_size + q_size + 3 * config.intermediate_size
    limit = LAUNCH_FLOPS / (2 * config.hidden_size * width)
    return sorted({min(n, max_num_batched_tokens) for n in TOKEN_BUCKETS if n <= limit})


class PrefillWorker:
    """Launches chunks of prompts over one KV cache; the caller sets device and stream."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        buffers: StageBuffers,
        *,
        max_model_len: int,
        buckets: Sequence[int],
        graph_pool: GraphPool | None,
        device: torch.device,
    ) -> None:
        """buffers: for as many tokens and sampled rows as one launch may have; buckets: the token
        counts, rising, to which launches are padded; graph_pool: see `StepGraphs`, None for padded
        launches without graphs."""
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.buffers = buffers
        self.device = device
        self.buckets = list(buckets)
        self.graphs = StepGraphs(device, graph_pool)
        max_rows = len(buffers.logits)
        self._sampled = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._num_rows = min(GRAPH_ROWS, max_rows)
        self._max_blocks = -(-max_model_len // kv_cache.block_size)
        self._inputs = {size: StaticInputs(self._fields(size), device) for size in self.buckets}

    def _fields(self, size: int) -> dict[str, tuple[type, tuple[int, ...]]]:
        rows = self._num_rows
        shapes = dict.fromkeys(("token_ids", "positions", "slot_mapping"), (size,))
        shapes |= {"cu_seqlens": (rows + 1,), "block_table": (rows, self._max_blocks)}
        return {name: (dtype, shapes.get(name, (rows,))) for name, dtype in PREFILL.items()}

    def warm_up(self) -> None:
        """Compile the kernels for launches of every size and capture the graphs, over tokens that
        are not stored."""
        longest = len(self.buffers.hidden)
        num_tokens = 1
        while num_tokens < longest:  # tiles change at powers of two
            self._compute(self._padding_batch(num_tokens))
            num_tokens *= 2
        self._compute(self._padding_batch(longest))
        for size in reversed(self.buckets):
            self._run_padded(size, {"cu_seqlens": [0]})

    def _padding_batch(self, num_tokens: int) -> PrefillBatch:
        num_blocks = -(-num_tokens // self.kv_cache.block_size)
        columns: dict[str, Any] = {
            "token_ids": [0] * num_tokens,
            "positions": [0] * num_tokens,
            "slot_mapping": [-1] * num_tokens,
            "sampled_rows": [0],
            "block_table": [[0] * num_blocks],
            "context_lens": [num_tokens],
            "cu_seqlens": [0, num_tokens],
            **{name: [0] for name in SAMPLING},
        }
        return PrefillBatch.of(columns, self.device)

    def bucket_of(self, chunks: Sequence[PrefillChunk]) -> int | None:
        """The token count that this launch is padded to; None: it is launched eagerly, as it is."""
        if len(chunks) > self._num_rows:
            return None
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        return next((size for size in self.buckets if size >= num_tokens), None)

    def launch(
        self, chunks: Sequence[PrefillChunk], table_of: BlockTableOf
    ) -> tuple[Launched, Tensor]:
        """Compute the chunks; where a prompt ends, draw its first token.

        Returns the tokens on their way to the host, and the same on the device: [B] int64, a row
        for each chunk with is_last, in order, overwritten by the next launch.
        """
        columns = prefill_columns(chunks, table_of, self.kv_cache.block_size)
        size = self.bucket_of(chunks)
        if size is None:
            self._compute(PrefillBatch.of(columns, self.device))
        else:
            self._run_padded(size, columns)
        requests = sampled_requests(chunks)
        token_ids = self._sampled[: len(requests)]
        return Launched(requests, token_ids, self.buffers.logits[: len(requests)]), token_ids

    def _run_padded(self, size: int, columns: dict[str, Any]) -> None:
        # rows of no request end where they begin, behind the last of a request
        padding = {"slot_mapping": -1, "cu_seqlens": columns["cu_seqlens"][-1]}
        self._inputs[size].upload(columns, padding)
        self.graphs.run(size, self._padded_step)

    def _padded_step(self, size: int) -> None:
        # Tokens are drawn for all rows, wanted or not: a launch of cut prompts alone, which wants
        # none, fills the token budget and seldom fits a bucket.
        self._compute(PrefillBatch.of_tensors(self._inputs[size].tensors, size))

    def _compute(self, batch: PrefillBatch) -> None:
        """Embed to sampled token, in static buffers."""
        num_rows = len(batch.sampled_rows)
        buffers = self.buffers.first(len(batch.token_ids), num_rows)
        self.decoder.embed(batch.token_ids, buffers)
        self.decoder.layers(buffers, batch.attention, self.kv_cache.layers)
        if num_rows:
            last = buffers.hidden.index_select(0, batch.sampled_rows)
            logits = self.decoder.lm_head(last, buffers)
            self.decoder.ops.sample(
                logits,
                *batch.sampling.arguments(),
                workspace=buffers.sample_workspace,
                out=self._sampled[:num_rows],
            )
