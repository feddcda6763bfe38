"""Times of copies between the two pools of an idle PDCore, and of prompts that go through it."""

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine import SamplingParams
from engine.build import ops_of
from engine.device import Span
from engine.handoff import KVLink, Way, has_peer_access
from engine.handoff_queue import HandoffQueue
from engine.pd_core import PUSH_GROUPS, PUSH_TOKENS, PDCore
from engine.prefill import segments
from engine.request import Request
from experiments.timing import Times

NUM_COPIES = 10  # timed, of each kind
HOLD_BYTES = 512 << 20  # exceeds L2, so that copies read HBM
NUM_HOLDS = 32  # some 7 ms on an H100: longer, as a rule, than the host takes to launch a copy
MAX_HOLDS = 1024


@dataclass(frozen=True)
class PromptTimes:
    """Milliseconds of prompts that came one by one."""

    prefill_ms_p50: float  # of the prefill device, for one prompt
    exposed_ms_p50: float  # that decode waited for a prompt's blocks alone
    exposed_ms_p90: float


def ways_of(core: PDCore) -> list[Way]:
    """How blocks can go from its prefill to its decode pool."""
    source, target = (w.kv_cache.blocks.device for w in (core.prefill, core.decode))
    if not has_peer_access(source, target):
        return ["staged"]
    return ["kernel", "copy_engine"] if source.type == "cuda" else ["kernel"]


class HandoffTimer:
    """Of one engine that has no requests; what its pools hold is overwritten."""

    def __init__(self, core: PDCore, kernels: str) -> None:
        """kernels: "triton" or "reference", those that the engine runs on."""
        self._core = core
        source, target = core.prefill.kv_cache, core.decode.kv_cache
        ops, ways = ops_of(kernels), ways_of(core)
        self._links = {way: [KVLink(source, target, ops, way) for _ in range(2)] for way in ways}
        with torch.inference_mode():  # as the pools were made; on streams that are waited for below
            source.blocks.normal_()
            target.blocks.zero_()
        self._source, self._target = source, target
        device = source.blocks.device
        is_cuda = device.type == "cuda"
        self._held = torch.empty(HOLD_BYTES * is_cuda, dtype=torch.uint8, device=device)
        self._num_holds = NUM_HOLDS
        parts = segments(core.model_config.num_layers, PUSH_GROUPS)
        self._groups = [part.layers for part in parts if part.layers]
        self._rng = random.Random(0)
        for cache in (source, target) if is_cuda else ():
            torch.cuda.synchronize(cache.blocks.device)

    @property
    def ways(self) -> list[Way]:
        """What there is to time."""
        return list(self._links)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks of a prompt."""
        return -(-num_tokens // self._source.block_size)

    def num_bytes(self, num_tokens: int) -> int:
        """Bytes of these."""
        return self.num_blocks(num_tokens) * self._source.blocks[0].nbytes

    @torch.inference_mode()
    def bulk(self, num_tokens: int) -> Times:
        """One copy of as many blocks that lie side by side, by torch."""
        n = self.num_blocks(num_tokens)
        source, target = self._source.blocks[:n], self._target.blocks[:n]
        link = next(iter(self._links.values()))[0]
        return self._times(link, lambda: target.copy_(source, non_blocking=True))

    @torch.inference_mode()
    def copies(self, num_tokens: int, mode: str, way: Way) -> Times:
        """Of a prompt's blocks, scattered over both pools, whole ("slab") or in groups of layers
        ("push"). AssertionError where they did not arrive."""
        link, n = self._links[way][0], self.num_blocks(num_tokens)
        layers = self._groups if mode == "push" else [None]
        pools = (range(self._source.num_blocks), range(self._target.num_blocks))
        there, to = [], []

        def send() -> None:
            there[:], to[:] = (self._rng.sample(pool, n) for pool in pools)
            copy = link.open(there, to)
            for group in layers:
                copy.send(group)

        times = self._times(link, send)
        sent, found = self._source.blocks[there[:8]].cpu(), self._target.blocks[to[:8]].cpu()
        assert torch.equal(sent, found), f"blocks must arrive by {mode} and {way}"
        return times

    def prompts(self, num_tokens: int, mode: str, way: Way, num_prompts: int) -> PromptTimes:
        """Prompts of so many tokens, each behind the end of the one before."""
        core = self._core
        core.scheduler.push_tokens = PUSH_TOKENS[mode]
        self._serve(num_tokens)  # what is compiled or captured at first use
        core.handoffs = HandoffQueue(core.scheduler, *self._links[way])
        prefill_ms = []
        for _ in range(num_prompts):
            before = core.stats.prefill_busy_ms
            self._serve(num_tokens)
            prefill_ms.append(core.stats.prefill_busy_ms - before)
        exposed = core.handoffs.stats.as_dict()["exposed_ms"]
        p50 = statistics.median(prefill_ms)
        return PromptTimes(p50, exposed["p50"], exposed["p90"])

    def _serve(self, num_tokens: int) -> None:
        request = Request(
            request_id=self._rng.getrandbits(60),
            token_ids=[1] * num_tokens,
            params=SamplingParams(max_tokens=3, ignore_eos=True),
        )
        self._core.scheduler.add(request)
        while not self._core.is_idle:
            self._core.step(lambda request, token_id: None)

    def _times(self, link: KVLink, send: Callable[[], object]) -> Times:
        for _ in range(2):  # the first one compiles
            self._once(link, send)
        return Times.of([self._held_once(link, send) for _ in range(NUM_COPIES)])

    def _held_once(self, link: KVLink, send: Callable[[], object]) -> float:
        """Milliseconds, without what the host takes to launch it."""
        ms, is_late = self._once(link, send)
        while is_late and self._num_holds < MAX_HOLDS:
            self._num_holds *= 2
            ms, is_late = self._once(link, send)
        return ms

    def _once(self, link: KVLink, send: Callable[[], object]) -> tuple[float, bool]:
        """Milliseconds, and whether the link had nothing left to do before all was launched."""
        with link.on_stream(()):
            for _ in range(self._num_holds):
                self._held.zero_()
            held = None if link.stream is None else link.stream.record_event()
            span = Span(self._source.blocks.device)
            send()
            span.stop()
            is_late = held is not None and held.query()
        span.wait()
        return span.ms, is_late
