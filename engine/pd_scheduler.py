"""Who is prefilled, handed over and decoded next, over two pools. Knows no tensors or devices.

What a loop over two devices does with it, in any order and at any pace:

    chunks = scheduler.schedule_prefill()      # launch on the prefill device, then
    scheduler.launched(chunks)
    handoffs = scheduler.schedule_handoffs()   # start the copies
    scheduler.handoff_done(handoff)            # for each whose event has passed
    requests = scheduler.schedule_decode()     # launch on the decode device: the first time since
                                               # its hand-over one feeds token_ids[-1], then known
    scheduler.record_token(request, token_id, epoch)
    scheduler.finish(request, reason)          # also abort, and preempt after a failed launch

Blocks that a copy touches are kept until `handoff_done`. Against launches it is the device's order
that keeps them: prefill launches follow each other on one stream, decode launches on another, and a
copy must wait for an event of each, recorded when it is started, or for the layer that it pushes.
A decode step launched before may still write a block that its request has lost since, and that the
copy was given. All calls come from one thread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.base_scheduler import BaseScheduler, PrefillChunk
from engine.block_manager import BlockManager
from engine.config import check_int
from engine.lease import Lease, Leases
from engine.request import Request, RequestState


@dataclass(frozen=True, slots=True, eq=False)
class Handoff:
    """KV blocks of one request to be copied from the prefill to the decode pool."""

    request: Request
    epoch: int  # the request's when it was started
    lease: Lease
    num_tokens: int  # whose k and v both tables hold once it is done, cached ones included
    src_blocks: Sequence[int]  # in token order; none where the decode pool has all cached
    dst_blocks: Sequence[int]  # as many

    @property
    def is_stale(self) -> bool:
        """The request has ended or is computed anew: nobody will read what is copied."""
        return self.epoch != self.request.epoch


class PDScheduler(BaseScheduler):
    """Prompts in one pool, outputs in the other, KV blocks handed over between them.

    A prompt is admitted only with a promise of decode blocks, see `num_needed`, and while fewer
    than max_decode_backlog are on their way to decode. So a prompt that is computed can always be
    handed over once there is a row for it among those that decode; it waits in the prefill pool
    until then. Who outgrows its promise takes free blocks that nobody was promised, or those of
    the latest arrival that has any, which is computed anew by the prefill device, known tokens and
    all (swapping its blocks out instead is left for later). One that is being copied is waited for,
    as its blocks could not be had before the copy has ended; meanwhile the others decode on.
    """

    state_after_prefill = RequestState.PREFILLED

    def __init__(
        self,
        prefill_blocks: BlockManager,
        decode_blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_decode_backlog: int,
        growth_tokens: int = 256,
        push_tokens: int | None = None,
        max_chunks: int | None = None,
        on_release: Callable[[Request], None] | None = None,
    ):
        """max_num_seqs: requests that decode or are being copied, at most; max_decode_backlog:
        those with blocks that do not decode yet, at most, ended ones with a copy in flight
        included, so that it bounds the copies and a launch's chunks too; growth_tokens: output
        that decode blocks are promised for; push_tokens: a hand-over of at least so many tokens
        may start with its last chunk's launch, so that layers can be pushed as they are computed,
        though the first token may then end the request in vain; None: none does; the others, and
        errors: see the base."""
        check_int("max_decode_backlog", max_decode_backlog, 1)
        check_int("growth_tokens", growth_tokens, 0)
        if push_tokens is not None:
            check_int("push_tokens", push_tokens, 0)
        smaller = min(prefill_blocks.num_blocks, decode_blocks.num_blocks)
        super().__init__(
            prefill_blocks,
            smaller * prefill_blocks.block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            max_chunks=max_chunks,
            on_release=on_release,
        )
        self.leases = Leases(prefill_blocks, decode_blocks)
        # of the running, by their states; the others decode
        self._prefilled: dict[int, Request] = {}  # in the order in which they were computed
        self._copying: set[int] = set()
        self.max_decode_backlog = max_decode_backlog
        self.peak_backlog = 0  # the most that there ever were, of `decode_backlog`
        self.growth_tokens = growth_tokens
        self.push_tokens = push_tokens

    @property
    def num_prefilled(self) -> int:
        """Requests whose prompts are launched to their end, and whose hand-over is still to
        start."""
        return len(self._prefilled)

    @property
    def num_copying(self) -> int:
        """Requests whose blocks are on their way, or whose first token the host is to learn yet."""
        return len(self._copying)

    @property
    def num_decoding(self) -> int:
        """Requests that decode: their blocks are in the decode pool, their first token is known."""
        return len(self.running) - self.num_prefilled - self.num_copying

    @property
    def decode_backlog(self) -> int:
        """Requests that hold blocks and do not decode yet, and copies that outlive theirs."""
        return self.num_running - self.num_decoding + self.leases.num_closing

    def prefill_table(self, request_id: int) -> list[int]:
        """The request's blocks in the prefill pool, in token order: live, not to be changed."""
        return self.leases.prefill.block_table(self.leases.lease_of(request_id).lease_id)

    def decode_table(self, request_id: int) -> list[int]:
        """The request's blocks in the decode pool, in token order: live, not to be changed."""
        return self.leases.decode.block_table(self.leases.lease_of(request_id).lease_id)

    def num_needed(self, request: Request) -> int:
        """Decode blocks that the request is admitted with, promised or shared: for all of its
        tokens and growth_tokens more, or as many as it may come to; none if its next token is its
        last."""
        num_tokens = len(request.token_ids)
        if self._never_decodes(num_tokens, request):
            return 0
        num_expected = num_tokens + max(1, self.growth_tokens)
        return self.leases.num_blocks(min(num_expected, request.max_total_tokens - 1))

    def schedule_prefill(self) -> list[PrefillChunk]:
        """See the base; nothing else lets the backlog grow."""
        chunks = super().schedule_prefill()
        self.peak_backlog = max(self.peak_backlog, self.decode_backlog)
        return chunks

    def schedule_handoffs(self) -> list[Handoff]:
        """Choose the hand-overs to start now, in the order in which prompts were computed.

        Each is reported by `handoff_done` or `handoff_failed` exactly once, whatever becomes of
        the request; one without blocks at once. With push_tokens, call this between
        `schedule_prefill` and the launch to push layers as they are computed.
        """
        num_placed = self.num_decoding + len(self._copying)
        num_free_rows = max(0, self.max_num_seqs - num_placed)
        ready = [request for request in self._prefilled.values() if self._is_ready(request)]
        return [self._hand_over(request) for request in ready[:num_free_rows]]

    def handoff_done(self, handoff: Handoff) -> bool:
        """Note that a copy's event has passed; in any order, at any time. True: the request's
        blocks are in the decode pool. False: it has lost them, nothing is to be done."""
        request = handoff.request
        if not self.leases.end_copy(handoff.lease):
            return False
        self.leases.commit(request.request_id, request.token_ids, handoff.num_tokens)
        self._refused = None  # it may be what the head begins with
        self._decode_if_ready(request)
        return True

    def handoff_failed(self, handoff: Handoff) -> None:
        """Note that a copy has ended, and that what it has written is not to be trusted: its
        request, unless it is gone, is computed anew. Nothing of the copy may run on."""
        if self.leases.end_copy(handoff.lease):
            self.preempt(handoff.request)

    def _may_admit(self, request: Request) -> bool:
        return self.decode_backlog < self.max_decode_backlog

    def _room(self) -> tuple[int, ...]:
        return *super()._room(), self.leases.room

    def _grant(self, request: Request) -> int | None:
        num_most = self.leases.num_blocks(request.max_total_tokens - 1)
        num_needed = self.num_needed(request)
        return self.leases.open(request.request_id, request.token_ids, num_needed, num_most)

    def _commit(self, request: Request, num_computed: int) -> None:
        self.leases.commit(request.request_id, request.token_ids, num_computed)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        return self.leases.grow(request.request_id, num_tokens)

    def _run(self, request: Request) -> None:
        super()._run(request)
        self._prefilled[request.request_id] = request

    def _return_blocks(self, request: Request) -> None:
        self._prefilled.pop(request.request_id, None)
        self._copying.discard(request.request_id)
        self.leases.close(request.request_id)

    def _first_token_known(self, request: Request) -> None:
        if request.state is RequestState.COPYING:  # it may come after its hand-over
            self._decode_if_ready(request)

    def _victim(self) -> Request | None:
        # blocks that come back with a copy in flight are waited for before others are taken
        if self.leases.num_closing:
            return None
        admitted = ((r, self.leases.lease_of(r.request_id)) for r in self._latest_first())
        # one that never decodes has no blocks to give, and was promised none
        victim, lease = next((r, its) for r, its in admitted if its.in_decode or its.num_owed)
        return None if lease.is_copying else victim

    def _never_decodes(self, num_tokens: int, request: Request) -> bool:
        """The token behind num_tokens is the request's last, and prefill samples that one."""
        return num_tokens + 1 >= request.max_total_tokens

    def _is_ready(self, request: Request) -> bool:
        """Of one that is computed and not copied yet: there is something to decode, as far as that
        is known, and its copy may start."""
        if self._never_decodes(request.num_computed_tokens, request):
            return False
        if not request.num_in_flight:
            return True
        return self.push_tokens is not None and request.num_computed_tokens >= self.push_tokens

    def _hand_over(self, request: Request) -> Handoff:
        num_tokens = request.num_computed_tokens
        blocks = self.leases.start_copy(request.request_id, request.token_ids, num_tokens)
        self._refused = None  # cached blocks that are shared now cost the head none
        request.state = RequestState.COPYING
        del self._prefilled[request.request_id]
        self._copying.add(request.request_id)
        lease = self.leases.lease_of(request.request_id)
        return Handoff(request, request.epoch, lease, num_tokens, *blocks)

    def _decode_if_ready(self, request: Request) -> None:
        """Let it decode once its blocks are there and its first token is known, which the decode
        device is given by the host."""
        if not self.leases.lease_of(request.request_id).is_copying and not request.num_in_flight:
            request.state = RequestState.DECODING
            self._copying.remove(request.request_id)
