"""Core: scheduler, workers and KV cache of one device, one step ahead of it. Knows no text."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from engine.batch import Launched
from engine.block_manager import BlockManager
from engine.config import EngineConfig
from engine.decode import DecodeWorker
from engine.kv_cache import KVCache, num_blocks_that_fit
from engine.prefill import PrefillWorker, token_buckets
from engine.request import FinishReason, Request
from engine.scheduler import Scheduler
from engine.stats import EngineStats
from models.config import ModelConfig
from models.decoder import Decoder
from models.weights import dummy_weights, load_weights

# told of each new token; returns why the request ends, where its text says so
OnToken = Callable[[Request, int], FinishReason | None]


class Result(NamedTuple):
    """A token of one request; stale unless the request's epoch is still this one."""

    request: Request
    epoch: int
    token_id: int
    logprobs: dict[int, float] | None


class Core:
    """Requests in, token ids out.

    A step is launched before the tokens of the step before it are known: the device has them
    already, so the host schedules, checks for ends and makes text while the device computes.
    """

    def __init__(
        self, config: EngineConfig, model_config: ModelConfig, folder: Path, device: torch.device
    ) -> None:
        self.device = device
        self.model_config = model_config
        self.stats = EngineStats()
        self._launched: deque[list[Launched]] = deque()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self._on_device():
            self._build(config, folder)

    def _build(self, config: EngineConfig, folder: Path) -> None:
        device, model_config = self.device, self.model_config
        kernels = config.resolve_kernels(str(device))
        model_len = _model_len(config, model_config)
        decoder = _decoder(config, model_config, folder, device, model_len, _ops(kernels))
        self.dtype = decoder.weights.embedding.dtype
        num_seqs, num_tokens = config.max_num_seqs, config.max_num_batched_tokens
        prefill_buffers = decoder.buffers(num_tokens, num_seqs, decode=False)
        decode_buffers = decoder.buffers(num_seqs, num_seqs, decode=True)
        # last, for it may take what memory is left
        self.kv_cache = _cache(config, decoder, device)
        self.block_manager = BlockManager(
            self.kv_cache.num_blocks, config.block_size, config.enable_prefix_caching
        )
        self.max_model_len = min(model_len, self.kv_cache.num_blocks * config.block_size)
        # the references look at values on the host, which a capture does not allow
        use_graphs = device.type == "cuda" and kernels == "triton" and not config.enforce_eager
        # one for both workers: their launches follow each other on one stream
        graph_pool = torch.cuda.graph_pool_handle() if use_graphs else None
        self.prefill = PrefillWorker(
            decoder,
            self.kv_cache,
            prefill_buffers,
            max_model_len=self.max_model_len,
            buckets=token_buckets(model_config, num_tokens) if use_graphs else [],
            graph_pool=graph_pool,
            device=device,
        )
        self.decode = DecodeWorker(
            decoder,
            self.kv_cache,
            decode_buffers,
            max_model_len=self.max_model_len,
            graph_pool=graph_pool,
            device=device,
        )
        self.scheduler = Scheduler(
            self.block_manager,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=num_tokens,
            max_model_len=self.max_model_len,
            on_release=self.decode.release,
        )
        if use_graphs:
            self.prefill.warm_up()
            self.decode.warm_up()
            for graphs in (self.prefill.graphs, self.decode.graphs):
                self.stats.graphs_captured(len(graphs.captured), graphs.capture_ms)

    def _on_device(self) -> AbstractContextManager[object]:
        stack = ExitStack()
        if self._stream is not None:
            stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(torch.cuda.stream(self._stream))
        stack.enter_context(torch.inference_mode())
        return stack

    @property
    def is_idle(self) -> bool:
        """No request is unfinished; results that nobody waits for may still be on their way."""
        return self.scheduler.is_idle

    def step(self, on_token: OnToken) -> list[Request]:
        """Launch the next step, then take the tokens of the one before it.

        Returns the requests that ended. An exception in a launch puts its requests back into the
        queue, blocks returned, and is raised again.
        """
        ended: list[Request] = []
        with self._on_device():
            launched: list[Launched] = []
            try:
                self._launch_prefill(launched)
                self._launch_decode(launched)
            finally:  # where the second launch fails, the first is under way all the same
                if launched:
                    self._launched.append(launched)
            # one step stays in flight, or none where there was nothing to launch
            while len(self._launched) > bool(launched):
                self._take(_results(self._launched.popleft()), on_token, ended)
        if self.is_idle:
            self.drain()
        return ended

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request in whatever state it is."""
        self.scheduler.finish(request, reason)
        request.finished_time = time.perf_counter()
        self.stats.request_finished(request)

    def drain(self) -> None:
        """Wait for what is in flight and drop it: nobody asks for it any more."""
        for launched in self._launched:
            for results in launched:
                results.wait()
        self._launched.clear()
        assert self.block_manager.is_idle, "KV blocks are held though no request is left"

    def _launch_prefill(self, launched: list[Launched]) -> None:
        chunks = self.scheduler.schedule_prefill()
        if not chunks:
            return
        now = time.perf_counter()
        for chunk in chunks:
            if chunk.request.first_scheduled_time is None:
                chunk.request.first_scheduled_time = now
        requests = [chunk.request for chunk in chunks]
        with self._requeued_on_error(requests):
            results, token_ids = self.prefill.launch(chunks, self.block_manager.block_table)
            self.decode.admit([request for request, _ in results.requests], token_ids)
        launched.append(results)
        self.scheduler.launched(chunks)
        self.stats.prefill_launched(sum(chunk.num_tokens for chunk in chunks))

    def _launch_decode(self, launched: list[Launched]) -> None:
        requests = self.scheduler.schedule_decode()
        if not requests:
            return
        with self._requeued_on_error(requests):
            launched.append(self.decode.launch(requests, self.block_manager.block_table))
        self.stats.decode_launched(len(requests))

    def _take(self, results: list[Result], on_token: OnToken, ended: list[Request]) -> None:
        """Hand on the tokens of one step. Where that fails, the request at fault ends with "error"
        and those behind it draw their tokens again."""
        now = time.perf_counter()
        for index, (request, epoch, token_id, logprobs) in enumerate(results):
            if not self.scheduler.record_token(request, token_id, epoch):
                continue
            if request.first_token_time is None:
                request.first_token_time = now
            if logprobs is not None:
                request.logprobs.append(logprobs)
            try:
                reason = on_token(request, token_id)
            except BaseException:
                self.finish(request, "error")
                unread = [r.request for r in results[index + 1 :] if r.request.epoch == r.epoch]
                self._requeue(unread)
                raise
            reason = reason or request.end_reason(self.model_config.eos_token_ids)
            if reason is not None:
                self.finish(request, reason)
                ended.append(request)

    @contextmanager
    def _requeued_on_error(self, requests: Sequence[Request]) -> Iterator[None]:
        """Put the requests of a failed launch back in front of the queue, in their order."""
        try:
            yield
        except BaseException:
            self._requeue(requests)
            raise

    def _requeue(self, requests: Sequence[Request]) -> None:
        for request in reversed(list(dict.fromkeys(requests))):
            self.scheduler.preempt(request)


def _results(launched: Sequence[Launched]) -> list[Result]:
    """Wait for the tokens of one step's launches."""
    return [
        Result(request, epoch, token_id, results.logprobs_of(row, token_id))
        for results in launched
        for row, ((request, epoch), token_id) in enumerate(
            zip(results.requests, results.wait(), strict=True)
        )
    ]


def _ops(kernels: str) -> ModuleType:
    """The namespace that the decoder runs on; Triton is imported only where it is used."""
    if kernels == "triton":
        import kernels as triton_kernels

        return triton_kernels
    from kernels import reference

    return reference


def _model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    """Tokens of the longest request; ValueError where model or cache cannot hold what is asked."""
    if config.num_kv_blocks is not None and config.num_kv_blocks * config.block_size < 2:
        raise ValueError(f"num_kv_blocks must hold 2 tokens or more, got {config.num_kv_blocks}")
    longest = model_config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ValueError(
            f"max_model_len must be at most the model's {longest}, got {config.max_model_len}"
        )
    return config.max_model_len or longest


def _decoder(
    config: EngineConfig,
    model_config: ModelConfig,
    folder: Path,
    device: torch.device,
    model_len: int,
    ops: ModuleType,
) -> Decoder:
    dtype = getattr(torch, config.resolve_dtype(model_config.dtype, str(device)))
    options = {"device": device, "dtype": dtype}
    if config.load_format == "dummy":
        weights = dummy_weights(model_config, **options, seed=config.seed)
    else:
        weights = load_weights(model_config, folder, **options, progress=True)
    return Decoder(model_config, weights, model_len, ops)


def _cache(config: EngineConfig, decoder: Decoder, device: torch.device) -> KVCache:
    options = {"device": device, "dtype": decoder.weights.embedding.dtype}
    num_blocks = config.num_kv_blocks or num_blocks_that_fit(
        decoder.config,
        config.block_size,
        **options,
        gpu_memory_utilization=config.gpu_memory_utilization,
    )
    return KVCache(decoder.config, num_blocks, config.block_size, **options)
