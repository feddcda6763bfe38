"""DecodeWorker: one token for every running request, as one CUDA graph per batch bucket."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.batch import SAMPLING, BlockTableOf, Launched
from engine.decode_rows import DecodeRows
from engine.device import Span
from engine.graphs import GraphPool, StaticInputs, StepGraphs
from engine.host_buffers import HostBuffers
from engine.kv_cache import KVCache
from engine.request import Request
from models.decoder import AttentionBatch, Decoder, StageBuffers

Column = Sequence[int] | np.ndarray
Columns = Mapping[str, Column]  # an input field -> a value per request

STEP_FIELDS = {
    "rows": np.int64,  # the request's row in the tables that stay on the device
    "positions": np.int64,
    "slot_mapping": np.int64,
    "context_lens": np.int32,
    **SAMPLING,
}


def batch_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph: each step pads to the next, few rows beyond what it needs."""
    sizes = {1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32)}
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


class DecodeWorker:
    """Launches decode steps over one KV cache; the caller sets device and stream.

    Newest tokens and block tables stay on the device, a row for each request, so that a step can be
    launched before the tokens of the one before it are known to the host.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        buffers: StageBuffers,
        *,
        max_model_len: int,
        graph_pool: GraphPool | None,
        device: torch.device,
        max_num_seqs: int | None = None,
    ) -> None:
        """buffers: for as many tokens and rows as one step may have; graph_pool: see `StepGraphs`,
        None for no graphs; max_num_seqs: requests that one step may have, None: as many as rows.

        ValueError where the buffers have fewer rows than that.
        """
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.buffers = buffers
        self.device = device
        max_rows = len(buffers.logits)
        max_num_seqs = max_rows if max_num_seqs is None else max_num_seqs
        if max_num_seqs > max_rows:
            raise ValueError(f"max_num_seqs must be at most {max_rows} rows, got {max_num_seqs}")
        self.buckets = batch_buckets(max_num_seqs)
        fields = {name: (dtype, (max_rows,)) for name, dtype in STEP_FIELDS.items()}
        self.inputs = StaticInputs(fields, device)
        self._host = HostBuffers(device)
        # one row more than there can be requests: padding reads and writes it
        self._padding = {"rows": max_rows, "slot_mapping": -1}
        max_blocks = -(-max_model_len // kv_cache.block_size)
        options = {"dtype": torch.int64, "device": device}
        self.token_ids = torch.zeros(max_rows + 1, **options)  # newest of each row
        self.block_table = torch.zeros(max_rows + 1, max_blocks, dtype=torch.int32, device=device)
        self._step_token_ids = torch.zeros(max_rows, **options)
        self._step_block_table = torch.zeros_like(self.block_table[:-1])
        self._sampled = torch.zeros(max_rows, **options)
        self.rows = DecodeRows(max_rows, kv_cache.block_size, max_blocks)
        self.graphs = StepGraphs(device, graph_pool)

    def admit(self, requests: Sequence[Request], token_ids: Tensor | None = None) -> None:
        """Give each request a row and put its newest token there. token_ids: [B] int64 on the
        device; None where the host knows them."""
        if not requests:
            return
        rows = self.rows.admit(requests)
        if token_ids is None:
            newest = [request.token_ids[-1] for request in requests]
            token_ids = self._host.send(newest, np.int64)
        self.token_ids.index_copy_(0, self._host.send(rows, np.int64), token_ids)

    def has_row(self, request: Request) -> bool:
        """Whether the request was admitted and not released since."""
        return request in self.rows

    def release(self, request: Request) -> None:
        """Take the request's row back; harmless where it has none."""
        self.rows.release(request)

    def launch(self, requests: Sequence[Request], table_of: BlockTableOf) -> Launched:
        """One token for each of these admitted requests."""
        span = Span(self.device)
        places = self._run_step(requests, self._columns(requests, table_of))
        size = max(places) + 1
        token_ids, logits = self._sampled[:size], self.buffers.logits[:size]
        return Launched("decode", span, self._host, requests, token_ids, logits, places)

    def _run_step(self, requests: Sequence[Request], columns: Columns) -> Sequence[int]:
        """Run or replay the step over these inputs; returns each request's row in it."""
        self.inputs.upload(columns, self._padding)
        self._run_serial(self._bucket_of(len(requests)))
        return range(len(requests))

    def _run_serial(self, size: int) -> None:
        """The step of so many rows, over inputs that are in place."""
        self.graphs.run(size, self._step)

    def _bucket_of(self, num_requests: int) -> int:
        """Rows of a step of so many requests."""
        return next(bucket for bucket in self.buckets if bucket >= num_requests)

    def warm_up(self) -> None:
        """Compile the kernels and capture the graphs of every bucket, over padding alone."""
        for size in reversed(self.buckets):
            self.inputs.upload({}, self._padding)
            self.graphs.run(size, self._step)

    def close(self) -> None:
        """Drop the graphs; nothing may be launched afterwards."""
        self.graphs.captured.clear()

    def _columns(self, requests: Sequence[Request], table_of: BlockTableOf) -> Columns:
        # the newest token's place is the last of these: the one this step draws comes behind it
        known = [len(request.token_ids) + request.num_in_flight - 1 for request in requests]
        rows, context_lens = self.rows.of(requests), np.array(known, np.int64)
        self._send_blocks(*self.rows.learn_blocks(requests, rows, context_lens, table_of))
        # a list too: micro-batches are cut by it, number by number
        return self.rows.columns(rows, context_lens) | {"context_lens": known}

    def _send_blocks(self, cells: Sequence[int], blocks: Sequence[int]) -> None:
        """Put blocks into cells of the device's block tables."""
        if cells:
            index = self._host.send(cells, np.int64)
            values = self._host.send(blocks, np.int32)
            self.block_table.view(-1).index_copy_(0, index, values)

    def _step(self, size: int) -> None:
        """Embed to sampled token for the first `size` rows of the inputs, in static buffers."""
        self._begin(size)
        rows = slice(size)
        buffers = self.buffers.micro_batch(rows)
        self.decoder.layers(buffers, self._attention_batch(rows), self.kv_cache.layers)
        self._end(size)

    def _begin(self, size: int) -> None:
        """Newest tokens and block tables of the step's rows, and the tokens' embeddings."""
        rows, token_ids = self.inputs.tensors["rows"][:size], self._step_token_ids[:size]
        torch.index_select(self.token_ids, 0, rows, out=token_ids)
        torch.index_select(self.block_table, 0, rows, out=self._step_block_table[:size])
        self.decoder.embed(token_ids, self.buffers.first(size, size))

    def _attention_batch(self, rows: slice) -> AttentionBatch:
        inputs = self.inputs.tensors
        return AttentionBatch(
            positions=inputs["positions"][rows],
            slot_mapping=inputs["slot_mapping"][rows],
            block_table=self._step_block_table[rows],
            context_lens=inputs["context_lens"][rows],
        )

    def _end(self, size: int) -> None:
        """Logits and tokens of the step's rows; the tokens are the newest of their requests."""
        buffers, sampled = self.buffers.first(size, size), self._sampled[:size]
        logits = self.decoder.lm_head(buffers.hidden, buffers)
        sampling = [self.inputs.tensors[name][:size] for name in SAMPLING]
        workspace = buffers.sample_workspace
        self.decoder.ops.sample(logits, *sampling, workspace=workspace, out=sampled)
        self.token_ids.index_copy_(0, self.inputs.tensors["rows"][:size], sampled)
