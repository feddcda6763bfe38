"""Hand-overs in flight: copies started for them, and the scheduler told when these have ended."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.base_scheduler import PrefillChunk
from engine.handoff import Copy, Events, KVLink, Way
from engine.pd_scheduler import Handoff, PDScheduler
from engine.stats import HandoffStats

BlockPairs = tuple[Sequence[int], Sequence[int]]  # of the source and, as many, of the target


@dataclass(eq=False)
class _Transfer:
    """Hand-overs whose blocks go together."""

    handoffs: Sequence[Handoff]
    copies: list[Copy] = field(default_factory=list)
    start_time: float = field(default_factory=time.perf_counter)


class HandoffQueue:
    """Each hand-over from its start until its copies have ended, in whatever order they do.

    A failure to start leaves what was sent in the queue, so that no block is freed before its time;
    the caller takes the request's blocks away, and its hand-over then ends as a stale one.
    """

    def __init__(self, scheduler: PDScheduler, slabs: KVLink, pushes: KVLink) -> None:
        """slabs, pushes: links between the same pools, one for each way of handing over: what is
        computed need not wait on a stream for what is not."""
        self._scheduler = scheduler
        self._slabs = slabs
        self._pushes = pushes
        self.stats = HandoffStats()
        self._transfers: list[_Transfer] = []

    def __len__(self) -> int:
        return sum(len(transfer.handoffs) for transfer in self._transfers)

    @property
    def way(self) -> Way:
        """How blocks are copied."""
        return self._slabs.way

    def start(self, handoffs: Sequence[Handoff], after: Events) -> None:
        """Send whole blocks of prompts that are computed, in one launch, behind the events."""
        blocks = [(handoff.src_blocks, handoff.dst_blocks) for handoff in handoffs]
        self._open(self._slabs, self._new(handoffs), blocks).send(None, after)

    def push(
        self, handoffs: Sequence[Handoff], chunks: Sequence[PrefillChunk], after: Events
    ) -> Callable[[range, Events], None]:
        """Begin to send blocks of prompts whose last chunks are about to be launched.

        What earlier launches have filled goes at once, behind the events. Returns the function that
        sends a group of layers of the others: to be called with the layers and the events behind
        which these are computed.
        """
        transfer = self._new(handoffs)
        first_of = {chunk.request: chunk.start // self._block_size for chunk in chunks}
        before, behind = [], []
        for handoff in handoffs:
            # counted from the prompt's end: leading blocks that decode has cached are not sent
            num_left_out = self._num_blocks(handoff.num_tokens) - len(handoff.src_blocks)
            cut = max(0, first_of[handoff.request] - num_left_out)
            before.append((handoff.src_blocks[:cut], handoff.dst_blocks[:cut]))
            behind.append((handoff.src_blocks[cut:], handoff.dst_blocks[cut:]))
        copies = [self._open(self._pushes, transfer, blocks) for blocks in (before, behind)]
        copies[0].send(None, after)
        return copies[1].send

    def poll(self) -> bool:
        """Report the hand-overs whose copies have ended. True: there were some."""
        is_over = False
        for transfer in list(self._transfers):
            try:
                is_done = all(copy.is_done for copy in transfer.copies)
            except Exception:  # Ctrl-C is none of it: the copy may still run
                self._fail(transfer)
                raise
            if is_done:
                is_over = True
                self._end(transfer)
        return is_over

    def wait(self) -> None:
        """Report them all, each as soon as its copies have ended."""
        for transfer in list(self._transfers):
            try:
                for copy in transfer.copies:
                    copy.wait()
            except Exception:
                self._fail(transfer)
                raise
            self._end(transfer)

    def _fail(self, transfer: _Transfer) -> None:
        """Of a device that has failed: nothing of it runs on."""
        self._transfers.remove(transfer)
        for handoff in transfer.handoffs:
            self._scheduler.handoff_failed(handoff)

    def _new(self, handoffs: Sequence[Handoff]) -> _Transfer:
        self._transfers.append(_Transfer(handoffs))
        return self._transfers[-1]

    def _open(self, link: KVLink, transfer: _Transfer, blocks: Sequence[BlockPairs]) -> Copy:
        source = [block for sources, _ in blocks for block in sources]
        target = [block for _, targets in blocks for block in targets]
        transfer.copies.append(link.open(source, target))
        return transfer.copies[-1]

    def _end(self, transfer: _Transfer) -> None:
        self._transfers.remove(transfer)
        num_bytes = sum(copy.num_bytes for copy in transfer.copies)
        copy_ms = sum(copy.ms for copy in transfer.copies)
        self.stats.handed_over(len(transfer.handoffs), num_bytes, copy_ms)
        now = time.perf_counter()
        for handoff in transfer.handoffs:
            if not self._scheduler.handoff_done(handoff):
                continue
            request, start = handoff.request, transfer.start_time
            if request.num_in_flight:  # its token is waited for, not its blocks
                start = now
            elif request.last_token_time is not None:
                start = max(start, request.last_token_time)
            self.stats.decode_waited((now - start) * 1e3)

    @property
    def _block_size(self) -> int:
        return self._slabs.source.block_size

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
