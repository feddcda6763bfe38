"""PrefillWorker: prompts to KV blocks and first tokens, on one device.

Kernel by kernel, the host takes longer to launch a short prompt than the device to compute it.
Such launches are padded to a bucket of tokens and a fixed number of chunks, and are one CUDA graph
from embedding to drawn token, or one for each group of layers, whose k and v can then be sent away
while the next is computed. Padding is inert: a padding token is stored nowhere and belongs to no
request, so that attention neither reads nor writes its row, and all other kernels keep to rows.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
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
from engine.device import Span
from engine.graphs import GraphPool, StaticInputs, StepGraphs
from engine.host_buffers import HostBuffers
from engine.kv_cache import KVCache
from models.config import ModelConfig
from models.decoder import Decoder, StageBuffers

# Up to some 256 tokens a launch is bound by reading the weights and padding costs little; behind
# that, steps of at most a half. Each bucket costs start-up time: no more than ten.
TOKEN_BUCKETS = (16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)

# What an H100 computes while the host launches the eight kernels of a layer, some 0.35 ms. Where a
# layer takes more, the host is no longer what is waited for, and padding would only cost.
LAUNCH_FLOPS = 2e11

# Beyond, for a worker whose host must be free for another device: a padded token costs what a real
# one does, and 512 are at most a quarter of the launch, as a rule a twentieth.
BUCKET_STEP = 512

# What kernels are compiled for changes at powers of two of tokens up to this one, and at multiples
# of it behind, as products are cut in tiles that divide among the SMs; of chunks at powers of two.
TILE_STEP = 64

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


def all_token_buckets(max_num_batched_tokens: int) -> list[int]:
    """Token counts, rising, that hold every launch, whatever the device takes for it."""
    sizes = [*TOKEN_BUCKETS, *range(TOKEN_BUCKETS[-1], max_num_batched_tokens, BUCKET_STEP)]
    return sorted({n for n in sizes if n < max_num_batched_tokens} | {max_num_batched_tokens})


def warm_up_lengths(max_tokens: int, max_rows: int) -> list[list[int]]:
    """Lengths of the chunks of launches that between them take every compiled kernel which one of
    so many tokens and chunks at most may take."""
    first = TILE_STEP.bit_length() - 1
    small = [2**i for i in range(first)]
    sizes = [*small, *range(TILE_STEP, max_tokens, TILE_STEP)]
    alone = [[n] for n in sizes if n < max_tokens] + [[max_tokens]]
    many = [2**i + 1 for i in range(first, max_rows.bit_length())]  # chunks
    # a long chunk among short ones, whose mean is short; the next power of two of chunks
    together = [[TILE_STEP + 1, 1], *([TILE_STEP] * n for n in many)]
    return alone + [
        lengths for lengths in together if sum(lengths) <= max_tokens and len(lengths) <= max_rows
    ]


class Segment(NamedTuple):
    """What is launched at a time: layers in turn and, behind the last, the draw of tokens."""

    layers: range
    draws: bool


def segments(num_layers: int, groups: Sequence[int]) -> list[Segment]:
    """One for all, or layers in groups of about these sizes, one to another, and the draw apart so
    that the last group need not wait for it."""
    if len(groups) == 1:
        return [Segment(range(num_layers), True)]
    ends = [num_layers * end // sum(groups) for end in accumulate(groups)]
    parts = [range(a, b) for a, b in pairwise([0, *ends]) if a < b]
    return [*(Segment(part, False) for part in parts), Segment(range(0), True)]


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
        graph_rows: int = GRAPH_ROWS,
        layer_groups: Sequence[int] = (1,),
    ) -> None:
        """buffers: for as many tokens and sampled rows as one launch may have; buckets: the token
        counts, rising, to which launches are padded; graph_pool: see `StepGraphs`, None for padded
        launches without graphs; graph_rows: chunks that a padded launch may have;
        layer_groups: the parts that a launch is cut into, see `segments` and `launch`."""
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.buffers = buffers
        self.device = device
        self.buckets = list(buckets)
        self.graphs = StepGraphs(device, graph_pool)
        max_rows = len(buffers.logits)
        self._sampled = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._host = HostBuffers(device)
        self._num_rows = min(graph_rows, max_rows)
        self._segments = segments(decoder.config.num_layers, layer_groups)
        self._max_blocks = -(-max_model_len // kv_cache.block_size)
        self._inputs = {size: StaticInputs(self._fields(size), device) for size in self.buckets}

    def _fields(self, size: int) -> dict[str, tuple[type, tuple[int, ...]]]:
        rows = min(self._num_rows, size)
        shapes = dict.fromkeys(("token_ids", "positions", "slot_mapping"), (size,))
        shapes |= {"cu_seqlens": (rows + 1,), "block_table": (rows, self._max_blocks)}
        return {name: (dtype, shapes.get(name, (rows,))) for name, dtype in PREFILL.items()}

    def warm_up(self) -> None:
        """Compile the kernels for launches of every size and capture the graphs, over tokens that
        are not stored."""
        longest, max_rows = len(self.buffers.hidden), len(self.buffers.logits)
        one_layer = Segment(range(1), True)  # all are alike
        # none is launched eagerly where the largest has a graph, of as many chunks as may come
        has_graphs = longest in self.buckets and self._num_rows == max_rows
        for lengths in [] if has_graphs else warm_up_lengths(longest, max_rows):
            span = Span(self.device)
            self._compute(self._padding_batch(lengths), one_layer)
            span.stop()
            span.wait()  # else the host would be ahead by all of them, in pinned buffers of its own
        for size in reversed(self.buckets):
            self._upload(size, {"cu_seqlens": [0]})
            for index in range(len(self._segments)):
                self.graphs.run((size, index), self._padded_step)

    def _padding_batch(self, lengths: Sequence[int]) -> PrefillBatch:
        """Chunks of these lengths, none of which is stored; a token is drawn for each."""
        num_tokens, num_rows = sum(lengths), len(lengths)
        ends = np.cumsum(lengths)
        columns: dict[str, Any] = {
            "token_ids": np.zeros(num_tokens),
            "positions": np.zeros(num_tokens),
            "slot_mapping": np.full(num_tokens, -1),
            "sampled_rows": ends - 1,
            "block_table": np.zeros((num_rows, -(-max(lengths) // self.kv_cache.block_size))),
            "context_lens": lengths,
            "cu_seqlens": [0, *ends],
            **{name: np.zeros(num_rows) for name in SAMPLING},
        }
        return PrefillBatch.of(columns, self._host)

    def bucket_of(self, chunks: Sequence[PrefillChunk]) -> int | None:
        """The token count that this launch is padded to; None: it is launched eagerly, as it is."""
        if len(chunks) > self._num_rows:
            return None
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        return next((size for size in self.buckets if size >= num_tokens), None)

    def launch(
        self,
        chunks: Sequence[PrefillChunk],
        table_of: BlockTableOf,
        on_layers: Callable[[range], None] | None = None,
    ) -> tuple[Launched, Tensor]:
        """Compute the chunks; where a prompt ends, draw its first token.

        on_layers: called behind the launch of each group of layers, with these: their k and v are
        in the cache once the stream has come that far. Returns the tokens on their way to the host,
        and the same on the device: [B] int64, a row for each chunk with is_last, in order,
        overwritten by the next launch.
        """
        columns = prefill_columns(chunks, table_of, self.kv_cache.block_size)
        requests = sampled_requests(chunks)
        size = self.bucket_of(chunks)
        span = Span(self.device)
        if size is None:
            batch = PrefillBatch.of(columns, self._host)
        else:
            self._upload(size, columns)
        for index, segment in enumerate(self._segments):
            if not segment.layers and not requests:
                continue
            if size is None:
                self._compute(batch, segment)
            else:
                self.graphs.run((size, index), self._padded_step)
            if on_layers is not None and segment.layers:
                on_layers(segment.layers)
        token_ids = self._sampled[: len(requests)]
        logits = self.buffers.logits[: len(requests)]
        launched = Launched("prefill", span, self._host, requests, token_ids, logits)
        return launched, token_ids

    def _upload(self, size: int, columns: dict[str, Any]) -> None:
        # rows of no request end where they begin, behind the last of a request
        padding = {"slot_mapping": -1, "cu_seqlens": columns["cu_seqlens"][-1]}
        self._inputs[size].upload(columns, padding)

    def _padded_step(self, step: tuple[int, int]) -> None:
        # Tokens are drawn for all rows, wanted or not: a launch of cut prompts alone, which wants
        # none, fills the token budget and seldom fits a bucket.
        size, index = step
        batch = PrefillBatch.of_tensors(self._inputs[size].tensors, size)
        self._compute(batch, self._segments[index])

    def _compute(self, batch: PrefillBatch, segment: Segment) -> None:
        """Embed to sampled token, or what of it the segment has, in static buffers."""
        num_rows = len(batch.sampled_rows)
        buffers = self.buffers.first(len(batch.token_ids), num_rows)
        if segment.layers and segment.layers[0] == 0:
            self.decoder.embed(batch.token_ids, buffers)
        for layer in segment.layers:
            kv_cache = self.kv_cache.layers[layer]
            self.decoder.attention_stage(layer, buffers, batch.attention, kv_cache)
            self.decoder.ffn_stage(layer, buffers)
        if segment.draws and num_rows:
            last = buffers.hidden.index_select(0, batch.sampled_rows)
            logits = self.decoder.lm_head(last, buffers)
            self.decoder.ops.sample(
                logits,
                *batch.sampling.arguments(),
                workspace=buffers.sample_workspace,
                out=self._sampled[:num_rows],
            )
