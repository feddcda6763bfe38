"""Requests to the index tensors of one launch, and a launch's token ids back to the host."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.base_scheduler import PrefillChunk
from engine.device import Span
from engine.host_buffers import HostBuffers, Received
from engine.request import Request
from engine.stats import Phase
from models.decoder import AttentionBatch

# the arguments of `kernels.sample` behind the logits, in its order
SAMPLING = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "seeds": np.int64,
    "steps": np.int32,
}

# what a prefill launch reads; shapes stand at PrefillBatch
PREFILL = {
    "token_ids": np.int64,
    "positions": np.int64,
    "slot_mapping": np.int64,
    "sampled_rows": np.int64,
    "block_table": np.int32,
    "context_lens": np.int32,
    "cu_seqlens": np.int32,
    **SAMPLING,
}

BlockTableOf = Callable[[int], Sequence[int]]  # request_id -> its KV blocks in order


@dataclass(frozen=True, kw_only=True)
class SamplingTensors:
    """How the token of each row is drawn: the arguments of `kernels.sample`."""

    temperature: Tensor  # [B] fp32
    top_k: Tensor  # [B] int32
    top_p: Tensor  # [B] fp32
    min_p: Tensor  # [B] fp32
    seeds: Tensor  # [B] int64
    steps: Tensor  # [B] int32, tokens the request has generated before this one

    def arguments(self) -> tuple[Tensor, ...]:
        """In the order that `kernels.sample` takes them behind the logits."""
        return tuple(getattr(self, name) for name in SAMPLING)


def sampling_columns(requests: Sequence[Request]) -> dict[str, list[int] | list[float]]:
    """Those tensors' values on the host, by name, for requests whose newest token, still in
    flight, is the one to be drawn."""
    return param_columns(requests) | {"steps": [draw_index(request) for request in requests]}


def param_columns(requests: Sequence[Request]) -> dict[str, list[int] | list[float]]:
    """Those of them that never change for a request."""
    params = [request.params for request in requests]
    return {
        "temperature": [p.temperature for p in params],
        "top_k": [p.top_k for p in params],
        "top_p": [p.top_p for p in params],
        "min_p": [p.min_p for p in params],
        "seeds": [request.seed for request in requests],
    }


def draw_index(request: Request) -> int:
    """How many tokens the request has generated before its newest, which is in flight."""
    return request.num_tokens - 1 - request.num_prompt_tokens


@dataclass(frozen=True, kw_only=True)
class PrefillBatch:
    """Chunks of prompts, one after the other."""

    token_ids: Tensor  # [T] int64
    attention: AttentionBatch
    sampled_rows: Tensor  # [B] int64, the last token's row of each prompt that ends here
    sampling: SamplingTensors

    @classmethod
    def of(cls, columns: Mapping[str, Any], buffers: HostBuffers) -> "PrefillBatch":
        """What `prefill_columns` gives, on the device of these buffers."""
        tensors = {name: buffers.send(columns[name], dtype) for name, dtype in PREFILL.items()}
        return cls.of_tensors(tensors, int(np.diff(columns["cu_seqlens"]).max()))

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], max_query_len: int) -> "PrefillBatch":
        """Those tensors by the names of PREFILL; max_query_len: tokens of the longest chunk."""
        names = ("positions", "slot_mapping", "block_table", "context_lens", "cu_seqlens")
        attention = {name: tensors[name] for name in names}
        return cls(
            token_ids=tensors["token_ids"],
            attention=AttentionBatch(**attention, max_query_len=max_query_len),
            sampled_rows=tensors["sampled_rows"],
            sampling=SamplingTensors(**{name: tensors[name] for name in SAMPLING}),
        )


def sampled_requests(chunks: Sequence[PrefillChunk]) -> list[Request]:
    """Those whose last chunk this is, in order: a token is drawn for each."""
    return [chunk.request for chunk in chunks if chunk.is_last]


def prefill_columns(
    chunks: Sequence[PrefillChunk], table_of: BlockTableOf, block_size: int
) -> dict[str, Any]:
    """The values on the host of all that PREFILL names."""
    lengths = np.array([chunk.num_tokens for chunk in chunks])
    starts = np.array([chunk.start for chunk in chunks])
    ends = np.cumsum(lengths)
    # of each token, its place in the launch moved to its place in the prompt
    positions = np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
    block_table = _block_table([table_of(chunk.request.request_id) for chunk in chunks])
    indices = positions // block_size
    blocks = block_table[np.repeat(np.arange(len(chunks)), lengths), indices].astype(np.int64)
    return {
        "token_ids": _token_ids(chunks),
        "positions": positions,
        "slot_mapping": (blocks - indices) * block_size + positions,
        "sampled_rows": (ends - 1)[[chunk.is_last for chunk in chunks]],
        "block_table": block_table,
        "context_lens": starts + lengths,
        "cu_seqlens": [0, *ends],
        **sampling_columns(sampled_requests(chunks)),
    }


def _token_ids(chunks: Sequence[PrefillChunk]) -> np.ndarray:
    """The chunks' tokens, one chunk behind the other."""
    parts = (c.request.token_ids[c.start : c.start + c.num_tokens] for c in chunks)
    return np.concatenate([np.frombuffer(part, np.int64) for part in parts])


def _block_table(tables: Sequence[Sequence[int]]) -> np.ndarray:
    """The tables one below the other, 0 behind each: [B, max_blocks] int32."""
    block_table = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for row, table in zip(block_table, tables, strict=True):
        row[: len(table)] = table
    return block_table


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one launch, on their way to the host; rows as the requests."""

    sampled: Received  # [B] fp32, of the token that was drawn
    top: Received  # [B, K] fp32
    top_ids: Received  # [B, K] int64

    @classmethod
    def of(
        cls, buffers: HostBuffers, logits: Tensor, token_ids: Tensor, num_top: int
    ) -> "TokenLogprobs":
        """Of the unscaled logits: [B, V], before temperature and cuts."""
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        top, top_ids = logprobs.topk(max(num_top, 1), dim=-1)
        sampled = logprobs.gather(1, token_ids[:, None])[:, 0]
        return cls(*(buffers.receive(tensor) for tensor in (sampled, top, top_ids)))

    def row(self, index: int, token_id: int, num_top: int) -> dict[int, float]:
        """{token id: log-probability} of one row: the drawn token, then the likeliest."""
        ids, top = (received.tolist()[index][:num_top] for received in (self.top_ids, self.top))
        return {token_id: self.sampled.tolist()[index]} | dict(zip(ids, top, strict=True))


class Launched:
    """Token ids of one launch on their way to the host, and whose they are."""

    def __init__(
        self,
        phase: Phase,
        span: Span,
        buffers: HostBuffers,
        requests: Sequence[Request],
        token_ids: Tensor,
        logits: Tensor,
        places: Sequence[int] | None = None,
    ) -> None:
        """span: of the launch, stopped here; buffers: of its stream; token_ids: [B] int64 and
        logits: [B, V] on the device; places: each request's row there; None: row by row the
        requests'."""
        self.phase: Phase = phase
        self._places = range(len(requests)) if places is None else places
        self.requests = [(request, request.epoch) for request in requests]
        self.span = span
        self._logprobs = _wanted_logprobs(buffers, requests, token_ids, logits)
        self._token_ids = buffers.receive(token_ids)
        span.stop()

    @property
    def is_done(self) -> bool:
        """Whether the token ids are on the host."""
        return self.span.is_done

    def wait(self) -> list[int]:
        """The token ids, once they are on the host."""
        self.span.wait()
        token_ids = self._token_ids.tolist()
        return [token_ids[place] for place in self._places]

    def logprobs_of(self, index: int, token_id: int) -> dict[int, float] | None:
        """{token id: log-probability} where the request of this index asked for them; `wait`
        first."""
        num_top = self.requests[index][0].params.logprobs
        if num_top is None or self._logprobs is None:
            return None
        return self._logprobs.row(self._places[index], token_id, num_top)


def _wanted_logprobs(
    buffers: HostBuffers, requests: Sequence[Request], token_ids: Tensor, logits: Tensor
) -> TokenLogprobs | None:
    wanted = [r.params.logprobs for r in requests if r.params.logprobs is not None]
    if not wanted:
        return None
    return TokenLogprobs.of(buffers, logits, token_ids, min(max(wanted), logits.shape[1]))
