"""PrefillWorker: prompts to KV blocks and first tokens, on one device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch import BlockTableOf, Launched, PrefillBatch, SamplingTensors
from engine.kv_cache import KVCache
from engine.request import Request, SamplingParams
from engine.scheduler import PrefillChunk
from models.decoder import AttentionBatch, Decoder, StageBuffers


class PrefillWorker:
    """Launches chunks of prompts over one KV cache; the caller sets device and stream."""

    def __init__(
        self, decoder: Decoder, kv_cache: KVCache, buffers: StageBuffers, *, device: torch.device
    ) -> None:
        """buffers: for as many tokens and sampled rows as one launch may have."""
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.buffers = buffers
        self.device = device

    def warm_up(self) -> None:
        """Compile the kernels for launches of every size, over tokens that are not stored."""
        longest = len(self.buffers.hidden)
        num_tokens = 1
        while num_tokens < longest:  # tiles change at powers of two
            self._compute(self._padding_batch(num_tokens), self.buffers.first(num_tokens, 1))
            num_tokens *= 2
        self._compute(self._padding_batch(longest), self.buffers.first(longest, 1))

    def _padding_batch(self, num_tokens: int) -> PrefillBatch:
        zeros = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        num_blocks = -(-num_tokens // self.kv_cache.block_size)
        ints = {"dtype": torch.int32, "device": self.device}
        params = SamplingParams(temperature=0.0)
        request = Request(request_id=-1, token_ids=[0], params=params)
        return PrefillBatch(
            token_ids=zeros,
            attention=AttentionBatch(
                positions=zeros,
                slot_mapping=zeros - 1,
                block_table=torch.zeros(1, num_blocks, **ints),
                context_lens=torch.tensor([num_tokens], **ints),
                cu_seqlens=torch.tensor([0, num_tokens], **ints),
                max_query_len=num_tokens,
            ),
            sampled=[request],
            sampled_rows=zeros[:1],
            sampling=SamplingTensors.of([request], self.device),
        )

    def launch(
        self, chunks: Sequence[PrefillChunk], table_of: BlockTableOf
    ) -> tuple[Launched, Tensor]:
        """Compute the chunks; where a prompt ends, draw its first token.

        Returns the tokens on their way to the host, and the same on the device: [B] int64, a row
        for each chunk with is_last, in order.
        """
        batch = PrefillBatch.of(chunks, table_of, self.kv_cache.block_size, self.device)
        buffers = self.buffers.first(len(batch.token_ids), len(batch.sampled))
        token_ids = self._compute(batch, buffers)
        return Launched(batch.sampled, token_ids, buffers.logits), token_ids

    def _compute(self, batch: PrefillBatch, buffers: StageBuffers) -> Tensor:
        self.decoder.embed(batch.token_ids, buffers)
        self.decoder.layers(buffers, batch.attention, self.kv_cache.layers)
        if not batch.sampled:
            return batch.sampled_rows  # no rows: an empty tensor of the right dtype
        last = buffers.hidden.index_select(0, batch.sampled_rows)
        logits = self.decoder.lm_head(last, buffers)
        return self.decoder.ops.sample(
            logits, *batch.sampling.arguments(), workspace=buffers.sample_workspace
        )
