"""Core: scheduler, workers and KV cache of one device, one step ahead of it. Knows no text."""

from collections import deque
from pathlib import Path

import torch

from engine.base_core import BaseCore, OnToken
from engine.batch import Launched
from engine.block_manager import BlockManager
from engine.build import (
    decode_buffers,
    graph_pool,
    longest_request,
    make_cache,
    make_decode_worker,
    make_decoder,
    num_kv_blocks,
)
from engine.closing import closed_on_error
from engine.config import EngineConfig
from engine.device import DeviceStream
from engine.prefill import PrefillWorker, token_buckets
from engine.request import Request
from engine.scheduler import Scheduler
from models.config import ModelConfig


class Core(BaseCore):
    """Requests in, token ids out.

    A step is launched before the tokens of the step before it are known: the device has them
    already, so the host schedules, checks for ends and makes text while the device computes.
    """

    def __init__(
        self, config: EngineConfig, model_config: ModelConfig, folder: Path, device: torch.device
    ) -> None:
        super().__init__(model_config)
        self.device = device
        self._launched: deque[list[Launched]] = deque()  # by step, in the order of their launch
        self._side = DeviceStream(device)
        with self._side.active():
            self._build(config, folder)

    def _build(self, config: EngineConfig, folder: Path) -> None:
        device = self.device
        model_len = longest_request(config, self.model_config)
        decoder = make_decoder(config, self.model_config, folder, device, model_len)
        self.dtype = decoder.weights.embedding.dtype
        num_seqs, num_tokens = config.max_num_seqs, config.max_num_batched_tokens
        prefill_buffers = decoder.buffers(num_tokens, num_seqs)
        buffers = decode_buffers(config, decoder)
        # last, for it may take what memory is left
        self.kv_cache = make_cache(config, decoder, num_kv_blocks(config, decoder))
        self.block_manager = BlockManager(
            self.kv_cache.num_blocks, config.block_size, config.enable_prefix_caching
        )
        self.max_model_len = min(model_len, self.kv_cache.num_blocks * config.block_size)
        # one for both workers: their launches follow each other on one stream
        pool = graph_pool(config, device)
        self.prefill = PrefillWorker(
            decoder,
            self.kv_cache,
            prefill_buffers,
            max_model_len=self.max_model_len,
            buckets=token_buckets(self.model_config, num_tokens) if pool else [],
            graph_pool=pool,
            device=device,
        )
        self.decode = make_decode_worker(
            config,
            decoder,
            self.kv_cache,
            buffers,
            max_model_len=self.max_model_len,
            pool=pool,
            device=device,
        )
        with closed_on_error(self.decode):
            self.scheduler = Scheduler(
                self.block_manager,
                max_num_seqs=num_seqs,
                max_num_batched_tokens=num_tokens,
                max_model_len=self.max_model_len,
                on_release=self.decode.release,
            )
            self._warm_up(self.prefill)
            self._warm_up(self.decode)

    def step(self, on_token: OnToken) -> list[Request]:
        """Launch the next step, then take the tokens of the one before it; see the base."""
        with self._side.active():
            launched: list[Launched] = []
            try:
                try:
                    self._launch_prefill(launched)
                finally:  # where one launch fails, those of others go on
                    self._launch_decode(launched)
            finally:
                if launched:
                    self._launched.append(launched)
                # one step stays in flight, or none where there was nothing to launch
                while len(self._launched) > bool(launched):
                    while oldest := self._launched[0]:
                        self._take(oldest.pop(0), on_token)
                    self._launched.popleft()
        if self.is_idle:
            self.drain()
        return self.take_ended()

    def _drop_in_flight(self) -> None:
        while self._launched:
            for results in self._launched.popleft():
                results.wait()

    def _find_leftover(self) -> str:
        num_held = self.block_manager.num_blocks - self.block_manager.num_free_blocks
        return f"{num_held} blocks" if num_held else ""

    def assert_idle(self) -> None:
        """Assert that every KV block is back; see the base."""
        self.block_manager.assert_idle()

    @property
    def pools(self) -> tuple[BlockManager, BlockManager]:
        """One for both; see the base."""
        return self.block_manager, self.block_manager

    def _launch_prefill(self, launched: list[Launched]) -> None:
        chunks = self.scheduler.schedule_prefill()
        if not chunks:
            return
        self._prefill_scheduled(chunks)
        with self._requeued_on_error([chunk.request for chunk in chunks]):
            results, token_ids = self.prefill.launch(chunks, self.block_manager.block_table)
            self.decode.admit([request for request, _ in results.requests], token_ids)
        launched.append(results)
        self._prefill_launched(chunks)

    def _launch_decode(self, launched: list[Launched]) -> None:
        requests = self.scheduler.schedule_decode()
        if not requests:
            return
        with self._requeued_on_error(requests):
            launched.append(self.decode.launch(requests, self.block_manager.block_table))
        self.stats.decode_launched(len(requests))
