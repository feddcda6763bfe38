"""PDCore: prompts computed on one device, tokens drawn on another, KV blocks handed over between.

One host thread drives both and waits for neither while there is something to launch: it takes
results and copies that are there, launches what may be launched, and only where there is neither
does it sleep until the first of them comes.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from engine.base_core import BaseCore, OnToken
from engine.base_scheduler import PrefillChunk
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
    num_prefill_blocks,
    ops_of,
)
from engine.closing import closed_on_error
from engine.config import EngineConfig
from engine.decode import DecodeWorker
from engine.device import DeviceStream
from engine.handoff import KVLink
from engine.handoff_queue import HandoffQueue
from engine.pd_scheduler import Handoff, PDScheduler
from engine.prefill import PrefillWorker, all_token_buckets
from engine.request import Request
from models.config import ModelConfig

# Of each kind: one that runs and one behind it, so that no device waits for the host. Of prefill
# there may be one more, for which the host chooses its time, see `PDCore.step`.
MAX_LAUNCHES = 2
POLL_S = 10e-6  # how long the host sleeps where there is nothing to launch and nothing to take

# Chunks of one prefill launch: all have rows in its graph, for an eager launch would keep the host
# from the decode device for milliseconds.
MAX_CHUNKS = 64
# How many layers the groups have, one to another, of which each is pushed while the next is
# computed. Few, for each copy takes some 10 us to begin and end; fewer and fewer layers, for the
# last group's way is what decode waits for, and a copy between GPUs takes a tenth of its prefill.
PUSH_GROUPS = (4, 3, 1)
# kv_handoff -> the shortest prompt that is pushed, in tokens. Between two H100s a prompt of
# Qwen3-0.6B is ready sooner if pushed from 128 tokens on; fewer were not measured.
PUSH_TOKENS = {"slab": None, "push": 0, "auto": 128}


class PDCore(BaseCore):
    """Requests in, token ids out; see `Core`, which does it on one device."""

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        folder: Path,
        prefill_device: torch.device,
        decode_device: torch.device,
    ) -> None:
        """The devices may be one and the same: it then has two streams and two pools."""
        super().__init__(model_config)
        self._prefills: deque[Launched] = deque()
        self._decodes: deque[Launched] = deque()
        self._has_taken_tokens = False  # whether the last step took tokens of decode
        self._is_put_off = False  # whether the last step left prefill as it was
        # behind the decode launches that may still write blocks which were returned since
        self._fence: torch.cuda.Event | None = None
        self._mode = config.kv_handoff
        self._prefill_side = DeviceStream(prefill_device)
        self._decode_side = DeviceStream(decode_device)
        model_len = longest_request(config, model_config)
        with self._decode_side.active():
            self.decode = self._build_decode(config, folder, model_len)
        with closed_on_error(self.decode):
            self._build_rest(config, folder, model_len)

    def _build_rest(self, config: EngineConfig, folder: Path, model_len: int) -> None:
        """All but the decode worker, and the graphs of both."""
        num_decode_tokens = self.decode.kv_cache.num_blocks * config.block_size
        with self._prefill_side.active():
            self.prefill = self._build_prefill(config, folder, min(model_len, num_decode_tokens))
        self.dtype = self.decode.kv_cache.blocks.dtype
        num_prefill_tokens = self.prefill.kv_cache.num_blocks * config.block_size
        self.max_model_len = min(model_len, num_decode_tokens, num_prefill_tokens)
        self.scheduler = self._build_scheduler(config)
        self.leases = self.scheduler.leases
        self.handoffs = self._build_handoffs(config)
        for side, worker in ((self._prefill_side, self.prefill), (self._decode_side, self.decode)):
            with side.active():
                self._warm_up(worker)

    def _build_decode(self, config: EngineConfig, folder: Path, model_len: int) -> DecodeWorker:
        device = self._decode_side.device
        decoder = make_decoder(config, self.model_config, folder, device, model_len)
        buffers = decode_buffers(config, decoder)
        # last, for it may take what memory is left
        kv_cache = make_cache(config, decoder, num_kv_blocks(config, decoder))
        return make_decode_worker(
            config,
            decoder,
            kv_cache,
            buffers,
            max_model_len=min(model_len, kv_cache.num_blocks * config.block_size),
            pool=graph_pool(config, device),
            device=device,
        )

    def _build_prefill(self, config: EngineConfig, folder: Path, model_len: int) -> PrefillWorker:
        device, num_tokens = self._prefill_side.device, config.max_num_batched_tokens
        num_chunks = min(MAX_CHUNKS, config.max_decode_backlog)
        decoder = make_decoder(config, self.model_config, folder, device, model_len)
        buffers = decoder.buffers(num_tokens, num_chunks)
        num_needed = -(-model_len // config.block_size)
        num_blocks = num_prefill_blocks(config, decoder, num_needed)
        kv_cache = make_cache(config, decoder, num_blocks)
        pool = graph_pool(config, device)
        return PrefillWorker(
            decoder,
            kv_cache,
            buffers,
            max_model_len=min(model_len, kv_cache.num_blocks * config.block_size),
            buckets=all_token_buckets(num_tokens) if pool else [],
            graph_pool=pool,
            device=device,
            graph_rows=num_chunks,
            layer_groups=(1,) if config.kv_handoff == "slab" else PUSH_GROUPS,
        )

    def _build_scheduler(self, config: EngineConfig) -> PDScheduler:
        managers = [
            BlockManager(cache.num_blocks, config.block_size, config.enable_prefix_caching)
            for cache in (self.prefill.kv_cache, self.decode.kv_cache)
        ]
        return PDScheduler(
            *managers,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            max_decode_backlog=config.max_decode_backlog,
            growth_tokens=config.pd_growth_tokens,
            max_chunks=len(self.prefill.buffers.logits),
            push_tokens=PUSH_TOKENS[config.kv_handoff],
            on_release=self._released,
        )

    def _build_handoffs(self, config: EngineConfig) -> HandoffQueue:
        ops = ops_of(config.resolve_kernels(str(self._prefill_side.device)))
        with self._prefill_side.active():
            slabs, pushes = (
                KVLink(self.prefill.kv_cache, self.decode.kv_cache, ops) for _ in range(2)
            )
            self.link_gb_s = slabs.measure()
        if slabs.way == "staged":
            warnings.warn(
                f"no peer access between {self._prefill_side.device} and "
                f"{self._decode_side.device}: KV blocks go through host memory, at "
                f"{self.link_gb_s:.1f} GB/s",
                stacklevel=2,
            )
        return HandoffQueue(self.scheduler, slabs, pushes)

    def step(self, on_token: OnToken) -> list[Request]:
        """Launch all that may be launched and take all that is there; where there is neither,
        sleep until something is. See the base.

        A prefill launch takes the host a good part of a decode step, and tokens that come meanwhile
        wait for that. One more than the device needs is prepared right behind tokens of decode,
        when the next ones are furthest away.
        """
        try:
            is_busy = self._launch_decode()
            is_busy |= self._hand_over()
            if self._is_time_for_prefill():
                is_busy |= self._launch_prefill()
        except BaseException:  # where one launch fails, those of others go on
            self._collect(on_token)
            raise
        while not self._collect(on_token) and not is_busy and self._is_waiting:
            time.sleep(POLL_S)
        if self.is_idle:
            self.drain()
        return self.take_ended()

    def _is_time_for_prefill(self) -> bool:
        """Whether to prepare a prefill launch now; only where there is one to go on with may the
        answer be no, and not for long."""
        if not self._prefills:
            return True
        # tokens that are there go out first, but not twice in turn, or ones that always come would
        # put it off for ever
        has_tokens = bool(self._decodes) and self._is_done(self._decodes)
        self._is_put_off = has_tokens and not self._is_put_off
        if self._is_put_off:
            return False
        is_quiet = self._has_taken_tokens or has_tokens or not self._decodes
        return len(self._prefills) < MAX_LAUNCHES + is_quiet

    def _drop_in_flight(self) -> None:
        for launches in (self._prefills, self._decodes):
            while launches:
                launches.popleft().wait()
        self.handoffs.wait()

    def _find_leftover(self) -> str:
        return self.leases.leftover()

    def assert_idle(self) -> None:
        """Assert that every KV block is back; see the base."""
        self.leases.assert_idle()

    @property
    def pools(self) -> tuple[BlockManager, BlockManager]:
        """See the base."""
        return self.leases.prefill, self.leases.decode

    def _handoff_statistics(self) -> dict[str, object]:
        return self.handoffs.stats.as_dict() | {
            "mode": self._mode,
            "way": self.handoffs.way,
            "link_gb_s": self.link_gb_s,
            "num_in_flight": len(self.handoffs),
            "num_prefilled": self.scheduler.num_prefilled,
            "num_copying": self.scheduler.num_copying,
            "num_decoding": self.scheduler.num_decoding,
            "backlog": self.scheduler.decode_backlog,
            "peak_backlog": self.scheduler.peak_backlog,
            "credits": self.leases.credits,
        }

    @property
    def _is_waiting(self) -> bool:
        """Something is in flight that a request needs."""
        num_in_flight = len(self._prefills) + len(self._decodes) + len(self.handoffs)
        return num_in_flight > 0 and not self.is_idle

    def _launch_decode(self) -> bool:
        """One step ahead of the results: the next one feeds on tokens that are on the device."""
        requests = self.scheduler.schedule_decode() if len(self._decodes) < MAX_LAUNCHES else []
        if not requests:
            return False
        with self._requeued_on_error(requests), self._decode_side.active():
            self.decode.admit(self.decode.rows.without_row(requests))
            self._decodes.append(self.decode.launch(requests, self.scheduler.decode_table))
        self.stats.decode_launched(len(requests))
        return True

    def _launch_prefill(self) -> bool:
        chunks = self.scheduler.schedule_prefill()
        if not chunks:
            return False
        self._prefill_scheduled(chunks)
        with self._requeued_on_error([c.request for c in chunks]), self._prefill_side.active():
            on_layers = self._begin_push(chunks)
            results, _ = self.prefill.launch(chunks, self.scheduler.prefill_table, on_layers)
            self._prefills.append(results)
        self._prefill_launched(chunks)
        return True

    def _begin_push(self, chunks: Sequence[PrefillChunk]) -> Callable[[range], None] | None:
        """Begin to hand over prompts that end with these chunks, which are about to be launched.
        Returns what sends a group of layers once that is launched; None: there are no such."""
        if self.scheduler.push_tokens is None:
            return None
        handoffs = self.scheduler.schedule_handoffs()
        here = {chunk.request for chunk in chunks}
        pushed = [h for h in handoffs if h.request in here]
        others = [h for h in handoffs if h.request not in here]
        try:
            if others:
                self._start(others)
        finally:  # each is in the queue whatever happens, or its blocks would never come back
            send = self.handoffs.push(pushed, chunks, self._events()) if pushed else None
        return None if send is None else lambda layers: send(layers, self._events())

    def _hand_over(self) -> bool:
        """Start the hand-overs of prompts that are computed and for which decode has a row."""
        handoffs = self.scheduler.schedule_handoffs()
        if not handoffs:
            return False
        with self._prefill_side.active():
            self._start(handoffs)
        return True

    def _start(self, handoffs: Sequence[Handoff]) -> None:
        # a prompt whose token is known is computed: it need not wait for later launches
        is_computed = not any(h.request.num_in_flight for h in handoffs)
        with self._requeued_on_error([h.request for h in handoffs]):
            self.handoffs.start(handoffs, self._events(behind_prefill=not is_computed))

    def _events(self, *, behind_prefill: bool = True) -> list[torch.cuda.Event]:
        """What a copy that is started now has to wait for."""
        events = [self._prefill_side.record()] if behind_prefill else []
        return [event for event in [*events, self._fence] if event is not None]

    def _collect(self, on_token: OnToken) -> bool:
        """Take what has come. True: something has."""
        has_come = self._has_taken_tokens = False
        for launches in (self._decodes, self._prefills):
            if launches and self._is_done(launches):
                has_come = True
                self._has_taken_tokens |= launches is self._decodes
                self._take(launches.popleft(), on_token)
        return self.handoffs.poll() or has_come

    def _is_done(self, launches: deque[Launched]) -> bool:
        try:
            return launches[0].is_done
        except BaseException:  # a device that has failed: its tokens will never come
            self._requeue_fresh(launches.popleft(), 0)
            raise

    def _released(self, request: Request) -> None:
        """A request has given its blocks back: steps in flight may still write those of decode."""
        if self.decode.has_row(request):
            self.decode.release(request)
            self._fence = self._decode_side.record()
