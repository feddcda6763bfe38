"""Who holds what in two pools of KV blocks, and what a copy in flight still keeps from being freed.

Two lifetimes: a lease ends with its request, its blocks go back once no copy reads or writes them.
Knows nothing of tensors, devices or turns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.block_manager import BlockManager


@dataclass(slots=True, eq=False)
class Lease:
    """One request's hold on both pools, from admission until it ends or loses its blocks."""

    lease_id: int  # its key in both block managers: a request that comes again gets a new one
    request_id: int
    num_owed: int  # decode blocks promised and not granted yet
    max_decode_blocks: int  # it can never come to hold more
    num_shared: int  # leading decode blocks, of others, that it holds from the beginning
    in_prefill: bool = True  # it holds blocks there
    in_decode: bool = False
    is_copying: bool = False


class Leases:
    """Leases over a prefill and a decode pool, each with a block manager of its own.

    Credits are the free decode blocks that nobody was promised. A lease is opened with a promise,
    which its first decode blocks are taken from; what it needs beyond comes out of the credits.
    Promises never exceed the free blocks, so that a promised block can always be had. Leading
    blocks that the decode pool has cached are held from then on, and need no promise: where many
    prompts begin alike, only the first takes credits for what they share.
    """

    def __init__(self, prefill: BlockManager, decode: BlockManager):
        """Raises ValueError where both are one manager, or their block sizes differ."""
        if prefill is decode:
            raise ValueError("prefill and decode must be two block managers, got one for both")
        if prefill.block_size != decode.block_size:
            raise ValueError(
                f"decode must have blocks of {prefill.block_size} tokens as prefill has, "
                f"got {decode.block_size}"
            )
        self.prefill = prefill
        self.decode = decode
        self.num_owed = 0  # over all leases
        self._outgrown: set[int] = set()  # request_ids, see num_outgrown
        self._open: dict[int, Lease] = {}  # request_id -> its lease
        self._closing: dict[int, Lease] = {}  # lease_id -> closed while a copy is in flight
        self._next_id = 0

    @property
    def credits(self) -> int:
        """Free decode blocks that nobody was promised."""
        return self.decode.num_free_blocks - self.num_owed

    @property
    def num_closing(self) -> int:
        """Leases whose request is gone and whose blocks wait for a copy in flight."""
        return len(self._closing)

    @property
    def num_outgrown(self) -> int:
        """Leases whose next decode block comes out of the credits."""
        return len(self._outgrown)

    @property
    def room(self) -> int:
        """Credits that a newcomer may take: a block is left for each lease that has outgrown its
        promise, or the newcomer would soon be preempted."""
        return self.credits - self.num_outgrown

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.prefill.block_size)

    def lease_of(self, request_id: int) -> Lease:
        """The open lease of a request; KeyError where it has none."""
        return self._open[request_id]

    def open(
        self, request_id: int, token_ids: Sequence[int], num_needed: int, max_decode_blocks: int
    ) -> int | None:
        """Grant prefill blocks for all of token_ids and promise num_needed decode blocks, less
        those at the beginning that the decode pool has cached and that are shared from now on.

        Returns the tokens that the prefill pool has cached; None, and nothing has changed, where
        it has too few free blocks, or where the credits, less a block for each lease that has
        outgrown its promise, do not cover what is needed. num_needed is 0 for one that never
        decodes. ValueError where the request has a lease.
        """
        if request_id in self._open:
            raise ValueError(f"request_id must be one without a lease, got {request_id}")
        num_full = (len(token_ids) - 1) // self.decode.block_size
        if num_needed and num_needed - num_full > self.room:
            return None  # whatever is cached: to find that, the tokens would be hashed
        prefix = self.decode.find(token_ids if num_needed else [])
        num_shared = len(prefix.blocks)
        if num_needed and num_needed - num_shared + prefix.num_free > self.room:
            return None
        assert num_shared == 0 or num_shared < num_needed, "the newest token has no block"
        num_cached = self.prefill.admit(self._next_id, token_ids, digests=prefix.digests)
        if num_cached is None:
            return None
        lease = Lease(
            self._next_id, request_id, num_needed - num_shared, max_decode_blocks, num_shared
        )
        if num_shared:
            self.decode.share(lease.lease_id, prefix)
            lease.in_decode = True
        self._open[request_id] = lease
        self._next_id += 1
        self.num_owed += lease.num_owed
        return num_cached

    def start_copy(
        self, request_id: int, token_ids: Sequence[int], num_copied: int
    ) -> tuple[list[int], list[int]]:
        """Grant the promised decode blocks for all of token_ids and one token more at the least;
        return source and destination blocks of the first num_copied tokens, in token order.

        Leading blocks that the decode pool has cached are shared there and not among them. From
        here on both sides' blocks are kept until `end_copy`, whatever becomes of the request.
        """
        lease = self._open[request_id]
        if lease.in_decode:
            # to be found again with what has been computed since; nothing is granted in between
            self.decode.release(lease.lease_id)
        digests = self.prefill.digests(lease.lease_id)
        num_cached = self.decode.admit(lease.lease_id, token_ids, digests=digests)
        grown = num_cached is not None and self.decode.grow(lease.lease_id, num_copied + 1)
        assert grown, "a promised block is not free"
        destination = self.decode.block_table(lease.lease_id)
        self._pay(lease, len(destination) - lease.num_shared)
        lease.in_decode = lease.is_copying = True
        self._note_outgrown(lease)
        moved = slice(self.num_blocks(num_cached), self.num_blocks(num_copied))
        return self.prefill.block_table(lease.lease_id)[moved], destination[moved]

    def end_copy(self, lease: Lease) -> bool:
        """The copy reads and writes no more: free its source, and its destination if nobody wants
        it any longer. False: the lease was closed before. ValueError where no copy is in flight."""
        if not lease.is_copying:
            raise ValueError(f"request {lease.request_id} must have a copy in flight, has none")
        lease.is_copying = False
        if self._closing.pop(lease.lease_id, None) is not None:
            self._give_back(lease)
            return False
        self._give_back_prefill(lease)
        return True

    def grow(self, request_id: int, num_tokens: int) -> bool:
        """Make the decode blocks cover num_tokens, by promise or by credit; False: by neither."""
        lease = self._open[request_id]
        num_new = self.num_blocks(num_tokens) - len(self.decode.block_table(lease.lease_id))
        if num_new <= 0:
            return True
        if num_new > lease.num_owed + self.credits:
            return False
        self._pay(lease, num_new)
        has_grown = self.decode.grow(lease.lease_id, num_tokens)
        self._note_outgrown(lease)
        return has_grown

    def commit(self, request_id: int, token_ids: Sequence[int], num_computed: int) -> None:
        """Make the full blocks among the first num_computed tokens findable, in the pool where
        they are computed: prefill's until the copy has ended, decode's from then on."""
        lease = self._open[request_id]
        manager = self.prefill if lease.in_prefill else self.decode
        manager.commit(lease.lease_id, token_ids, num_computed)

    def close(self, request_id: int) -> None:
        """End a lease: promise and blocks go back, at once or when its copy has ended."""
        lease = self._open.pop(request_id)
        self._outgrown.discard(request_id)
        self._pay(lease, lease.num_owed)
        if lease.is_copying:
            # freed now, a block would be granted anew and overwritten while the copy reads it,
            # or by the copy while its next holder writes it
            self._closing[lease.lease_id] = lease
        else:
            self._give_back(lease)

    def leftover(self) -> str:
        """Which blocks are not back, in words; "" where all are. Cheap: no block is looked at."""
        leases = [*self._open.values(), *self._closing.values()]
        held = []
        for name, manager in (("prefill", self.prefill), ("decode", self.decode)):
            num_held = manager.num_blocks - manager.num_free_blocks
            if num_held:
                of = sorted(lease.request_id for lease in leases if getattr(lease, f"in_{name}"))
                held.append(f"{num_held} {name} blocks held by requests {of}")
        copying = sorted(lease.request_id for lease in leases if lease.is_copying)
        held += [f"copies in flight of requests {copying}"] if copying else []
        held += [f"{self.num_owed} decode blocks promised"] if self.num_owed else []
        return ", ".join(held)

    def assert_idle(self) -> None:
        """Assert that all blocks of both pools are back, and that the managers say so."""
        assert not self.leftover(), self.leftover()
        self.prefill.assert_idle()
        self.decode.assert_idle()

    def check(self) -> None:
        """Assert that promises can be kept and that leases and managers agree."""
        self.prefill.check()
        self.decode.check()
        leases = [*self._open.values(), *self._closing.values()]
        assert sum(lease.num_owed for lease in leases) == self.num_owed, "promises do not add up"
        assert self.num_owed >= 0, "a negative promise"
        assert 0 <= self.credits <= self.decode.num_blocks, "promises exceed the free blocks"
        for lease in leases:
            assert self.prefill.holds(lease.lease_id) == lease.in_prefill, "prefill disagrees"
            assert self.decode.holds(lease.lease_id) == lease.in_decode, "decode disagrees"
        assert all(lease.is_copying for lease in self._closing.values()), "a lease is forgotten"
        outgrown = {id_ for id_, lease in self._open.items() if self._is_outgrown(lease)}
        assert outgrown == self._outgrown, "leases have outgrown their promise unnoticed"

    def _is_outgrown(self, lease: Lease) -> bool:
        if lease.num_owed or not lease.in_decode:
            return False
        return len(self.decode.block_table(lease.lease_id)) < lease.max_decode_blocks

    def _note_outgrown(self, lease: Lease) -> None:
        # each time that blocks are granted: to count them anew, all leases would be looked at for
        # every request that is admitted
        if self._is_outgrown(lease):
            self._outgrown.add(lease.request_id)
        else:
            self._outgrown.discard(lease.request_id)

    def _pay(self, lease: Lease, num_blocks: int) -> None:
        """Take granted or returned blocks off what the lease was promised."""
        num_paid = min(num_blocks, lease.num_owed)
        lease.num_owed -= num_paid
        self.num_owed -= num_paid

    def _give_back_prefill(self, lease: Lease) -> None:
        if lease.in_prefill:
            lease.in_prefill = False
            self.prefill.release(lease.lease_id)

    def _give_back(self, lease: Lease) -> None:
        self._give_back_prefill(lease)
        if lease.in_decode:
            lease.in_decode = False
            self.decode.release(lease.lease_id)
