"""Requests to the index tensors of one launch, and a launch's token ids back to the host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.request import Request
from engine.scheduler import PrefillChunk
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

BlockTableOf = Callable[[int], Sequence[int]]  # request_id -> its KV blocks in order


def to_device(values: Any, dtype: type, device: torch.device) -> Tensor:
    """A tensor of host values, copied without waiting for the device."""
    array = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
    if device.type == "cuda":
        array = array.pin_memory()  # a copy from pageable memory would stop the host
    return array.to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class SamplingTensors:
    """How the token of each row is drawn: the arguments of `kernels.sample`."""

    temperature: Tensor  # [B] fp32
    top_k: Tensor  # [B] int32
    top_p: Tensor  # [B] fp32
    min_p: Tensor  # [B] fp32
    seeds: Tensor  # [B] int64
    steps: Tensor  # [B] int32, tokens the request has generated before this one

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> "SamplingTensors":
        """For requests whose newest token, still in flight, is the one to be drawn."""
        columns = sampling_columns(requests)
        return cls(
            **{name: to_device(columns[name], dtype, device) for name, dtype in SAMPLING.items()}
        )

    def arguments(self) -> tuple[Tensor, ...]:
        """In the order that `kernels.sample` takes them behind the logits."""
        return tuple(getattr(self, name) for name in SAMPLING)


def sampling_columns(requests: Sequence[Request]) -> dict[str, list[int] | list[float]]:
    """Those tensors' values on the host, by name."""
    params = [request.params for request in requests]
    return {
        "temperature": [p.temperature for p in params],
        "top_k": [p.top_k for p in params],
        "top_p": [p.top_p for p in params],
        "min_p": [p.min_p for p in params],
        "seeds": [request.seed for request in requests],
        "steps": [draw_index(request) for request in requests],
    }


def draw_index(request: Request) -> int:
    """How many tokens the request has generated before its newest, which is in flight."""
    return request.num_tokens - 1 - request.num_prompt_tokens


@dataclass(frozen=True, kw_only=True)
class PrefillBatch:
    """Chunks of prompts, one after the other."""

    token_ids: Tensor  # [T] int64
    attention: AttentionBatch
    sampled: list[Request]  # those whose last chunk this is
    sampled_rows: Tensor  # [len(sampled)] int64, their last token's row
    sampling: SamplingTensors

    @classmethod
    def of(
        cls,
        chunks: Sequence[PrefillChunk],
        table_of: BlockTableOf,
        block_size: int,
        device: torch.device,
    ) -> "PrefillBatch":
        """The index tensors of these chunks, on the device."""
        lens = [chunk.num_tokens for chunk in chunks]
        ends = np.cumsum(lens)
        sampled = [chunk.request for chunk in chunks if chunk.is_last]
        last_rows = [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.is_last]
        token_ids = [
            token_id
            for chunk in chunks
            for token_id in chunk.request.token_ids[chunk.start : chunk.start + chunk.num_tokens]
        ]
        return cls(
            token_ids=to_device(token_ids, np.int64, device),
            attention=_prefill_attention_batch(chunks, ends, table_of, block_size, device),
            sampled=sampled,
            sampled_rows=to_device(last_rows, np.int64, device),
            sampling=SamplingTensors.of(sampled, device),
        )


def _prefill_attention_batch(
    chunks: Sequence[PrefillChunk],
    ends: np.ndarray,
    table_of: BlockTableOf,
    block_size: int,
    device: torch.device,
) -> AttentionBatch:
    positions = [np.arange(c.start, c.start + c.num_tokens) for c in chunks]
    tables = [np.asarray(table_of(c.request.request_id), dtype=np.int32) for c in chunks]
    slots = [
        table[p // block_size].astype(np.int64) * block_size + p % block_size
        for table, p in zip(tables, positions, strict=True)
    ]
    padded = np.zeros((len(chunks), max(map(len, tables))), dtype=np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return AttentionBatch(
        positions=to_device(np.concatenate(positions), np.int64, device),
        slot_mapping=to_device(np.concatenate(slots), np.int64, device),
        block_table=to_device(padded, np.int32, device),
        context_lens=to_device([c.start + c.num_tokens for c in chunks], np.int32, device),
        cu_seqlens=to_device([0, *ends], np.int32, device),
        max_query_len=max(c.num_tokens for c in chunks),
    )


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of one launch, on their way to the host; rows as the requests."""

    sampled: Tensor  # [B] fp32, of the token that was drawn
    top: Tensor  # [B, K] fp32
    top_ids: Tensor  # [B, K] int64

    @classmethod
    def of(cls, logits: Tensor, token_ids: Tensor, num_top: int) -> "TokenLogprobs":
        """Of the unscaled logits: [B, V], before temperature and cuts."""
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        top, top_ids = logprobs.topk(max(num_top, 1), dim=-1)
        sampled = logprobs.gather(1, token_ids[:, None])[:, 0]
        return cls(to_host(sampled), to_host(top), to_host(top_ids))

    def row(self, index: int, token_id: int, num_top: int) -> dict[int, float]:
        """{token id: log-probability} of one row: the drawn token, then the likeliest."""
        ids = self.top_ids[index, :num_top].tolist()
        likeliest = dict(zip(ids, self.top[index, :num_top].tolist(), strict=True))
        return {token_id: self.sampled[index].item()} | likeliest


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host that is there once an event recorded after this call has passed."""
    if tensor.device.type != "cuda":
        return tensor.clone()  # the source is a buffer of the next launch too
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Launched:
    """Token ids of one launch on their way to the host, and whose they are."""

    def __init__(self, requests: Sequence[Request], token_ids: Tensor, logits: Tensor) -> None:
        """token_ids: [B] int64 and logits: [B, V] on the device, row by row the requests'."""
        self.requests = [(request, request.epoch) for request in requests]
        self._logprobs = _wanted_logprobs(requests, token_ids, logits)
        self._token_ids = to_host(token_ids)
        self._copied: torch.cuda.Event | None = None
        if token_ids.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(token_ids.device))

    def wait(self) -> list[int]:
        """The token ids, once they are on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._token_ids.tolist()

    def logprobs_of(self, row: int, token_id: int) -> dict[int, float] | None:
        """{token id: log-probability} where the row's request asked for them; `wait` first."""
        num_top = self.requests[row][0].params.logprobs
        if num_top is None or self._logprobs is None:
            return None
        return self._logprobs.row(row, token_id, num_top)


def _wanted_logprobs(
    requests: Sequence[Request], token_ids: Tensor, logits: Tensor
) -> TokenLogprobs | None:
    wanted = [r.params.logprobs for r in requests if r.params.logprobs is not None]
    if not wanted:
        return None
    return TokenLogprobs.of(logits, token_ids, min(max(wanted), logits.shape[1]))
