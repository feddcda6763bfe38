"""Which KV block belongs to which request. Knows nothing of tensors or devices."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from engine.config import check_int
from engine.free_blocks import FreeBlocks

# Part of the pool that is evicted at once: neighbours, as a rule, that make a run. Each on its own,
# in the order in which they were used, they would leave holes.
EVICTED_PART = 20


@dataclass(slots=True)
class _Holding:
    """What one request holds: its blocks in order, and the hash chain of the full ones."""

    table: list[int]
    digests: list[bytes] = field(default_factory=list)  # of the leading blocks, as far as known
    num_committed: int = 0  # leading blocks that lookups can find, or an equal block for them


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """Leading blocks of some tokens that are findable, as long as nothing is granted."""

    blocks: list[int]
    digests: list[bytes]  # of the tokens' leading full blocks, as far as they were needed
    num_free: int  # of the blocks: nobody refers to them


class BlockManager:
    """Grants KV blocks, counts who refers to them, and finds cached prefixes.

    A block is referred to by one request or more, or it is free. A free block whose content is
    still known stays findable until free blocks of unknown content have run out: then the least
    recently used ones are forgotten, as many as are needed or an EVICTED_PART-th of all blocks.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        check_int("num_blocks", num_blocks, 1)
        check_int("block_size", block_size, 1)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._holdings: dict[int, _Holding] = {}
        self._ref_counts = [0] * num_blocks
        self._blank = FreeBlocks(num_blocks)  # content unknown
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, findable; oldest first
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}  # the inverse

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody refers to, those with cached content included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks whose content a lookup can find, referred to or not."""
        return len(self._block_of)

    @property
    def is_idle(self) -> bool:
        """No request holds a block."""
        return not self._holdings

    def holds(self, request_id: int) -> bool:
        """Whether the request holds blocks."""
        return request_id in self._holdings

    def block_table(self, request_id: int) -> list[int]:
        """Return the request's blocks in token order: the live list, not to be changed."""
        return self._holdings[request_id].table

    def digests(self, request_id: int) -> Sequence[bytes]:
        """The hashes of the request's leading full blocks, as far as they were needed."""
        return self._holdings[request_id].digests

    def admit(
        self,
        request_id: int,
        token_ids: Sequence[int],
        *,
        keep_free: int = 0,
        digests: Sequence[bytes] = (),
    ) -> int | None:
        """Grant blocks for all of token_ids, the cached leading ones shared.

        digests: of these tokens, from a manager that has hashed them already. Returns the number of
        cached tokens, always less than len(token_ids) so that there is something to compute; or
        None, and nothing has changed, where fewer than keep_free blocks would be left.
        """
        if request_id in self._holdings:
            raise ValueError(f"request_id must be one without blocks, got {request_id}")
        if not token_ids:
            raise ValueError("token_ids must hold at least one token, got 0")
        if self.num_free_blocks <= keep_free:
            return None  # one block at least is always granted
        prefix = self.find(token_ids, digests)
        num_new = -(-len(token_ids) // self.block_size) - len(prefix.blocks)
        if self.num_free_blocks - prefix.num_free - num_new < keep_free:
            return None
        self.share(request_id, prefix)
        self._holdings[request_id].table.extend(self._grant(num_new))
        return len(prefix.blocks) * self.block_size

    def find(self, token_ids: Sequence[int], digests: Sequence[bytes] = ()) -> CachedPrefix:
        """The longest chain of cached full blocks, the last token left out.

        digests: of these tokens, from a manager that has hashed them already.
        """
        blocks: list[int] = []
        known = list(digests)
        num_full = (len(token_ids) - 1) // self.block_size if self.enable_prefix_caching else 0
        while len(blocks) < num_full:
            self._extend_digests(known, token_ids, len(blocks) + 1)
            block = self._block_of.get(known[len(blocks)])
            if block is None:
                break
            blocks.append(block)
        return CachedPrefix(blocks, known, sum(self._ref_counts[b] == 0 for b in blocks))

    def share(self, request_id: int, prefix: CachedPrefix) -> None:
        """Let a request hold what was found, and nothing has been granted since."""
        if request_id in self._holdings:
            raise ValueError(f"request_id must be one without blocks, got {request_id}")
        for block in prefix.blocks:
            if self._ref_counts[block] == 0:
                del self._cached[block]
            self._ref_counts[block] += 1
        table = list(prefix.blocks)
        self._holdings[request_id] = _Holding(table, prefix.digests, len(table))

    def grow(self, request_id: int, num_tokens: int) -> bool:
        """Make the table cover num_tokens: all the blocks that takes, or none and False."""
        table = self._holdings[request_id].table
        if num_tokens <= len(table) * self.block_size:
            return True
        num_new = -(-num_tokens // self.block_size) - len(table)
        if num_new > self.num_free_blocks:
            return False
        table.extend(self._grant(num_new))
        return True

    def commit(self, request_id: int, token_ids: Sequence[int], num_computed: int) -> None:
        """Make the full blocks among the first num_computed tokens findable."""
        holding = self._holdings[request_id]
        num_full = num_computed // self.block_size
        if num_full <= holding.num_committed or not self.enable_prefix_caching:
            return
        if num_full > len(holding.table) or num_computed > len(token_ids):
            limit = min(len(holding.table) * self.block_size, len(token_ids))
            raise ValueError(f"num_computed must be at most {limit}, got {num_computed}")
        self._extend_digests(holding.digests, token_ids, num_full)
        for i in range(holding.num_committed, num_full):
            self._publish(holding.table[i], holding.digests[i])
        holding.num_committed = num_full

    def release(self, request_id: int) -> None:
        """Give up the request's references; an id that holds nothing is a KeyError."""
        table = self._holdings.pop(request_id).table
        # last block first: a chain is of no use without its head, so its tail is evicted before
        counts, freed = self._ref_counts, []
        for block in reversed(table):
            counts[block] -= 1
            if not counts[block]:
                freed.append(block)
        self._free(freed)

    def check(self) -> None:
        """Assert that every block has owners or is free, and that the counts say so."""
        counts = [0] * self.num_blocks
        for holding in self._holdings.values():
            assert len(set(holding.table)) == len(holding.table), "a block twice in one table"
            for block in holding.table:
                counts[block] += 1
        assert counts == self._ref_counts, "reference counts differ from the tables"
        free = [*self._blank, *self._cached]
        unreferenced = [block for block, count in enumerate(counts) if count == 0]
        assert sorted(free) == unreferenced, "free blocks are not the unreferenced ones"
        inverse = {block: digest for digest, block in self._block_of.items()}
        assert inverse == self._digest_of, "the two directions of the cache differ"
        assert self._cached.keys() <= inverse.keys(), "a block counted as cached is not findable"
        assert inverse.keys().isdisjoint(self._blank), "a blank block is findable"

    def assert_idle(self) -> None:
        """Assert that every block is free."""
        assert self.is_idle, f"blocks still held by requests {sorted(self._holdings)}"
        self.check()

    def _extend_digests(
        self, digests: list[bytes], token_ids: Sequence[int], num_full: int
    ) -> None:
        """Hash on until there is a digest, of all tokens up to its end, for num_full blocks."""
        first = len(digests) * self.block_size
        tokens = array("q", token_ids[first : num_full * self.block_size])
        data, block_bytes = tokens.tobytes(), tokens.itemsize * self.block_size
        previous = digests[-1] if digests else b""
        for start in range(0, len(data), block_bytes):
            block = data[start : start + block_bytes]
            previous = blake2b(previous + block, digest_size=16).digest()
            digests.append(previous)

    def _publish(self, block: int, digest: bytes) -> None:
        if digest not in self._block_of:  # of equal blocks the first stays
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def _grant(self, num_blocks: int) -> list[int]:
        """Take so many free blocks, which there must be."""
        num_missing = num_blocks - len(self._blank)
        if num_missing > 0:
            self._evict(min(len(self._cached), max(num_missing, self.num_blocks // EVICTED_PART)))
        blocks = self._blank.take(num_blocks)
        for block in blocks:
            self._ref_counts[block] = 1
        return blocks

    def _evict(self, num_blocks: int) -> None:
        """Forget the content of so many cached blocks, the least recently used ones."""
        blocks = [self._cached.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in blocks:
            del self._block_of[self._digest_of.pop(block)]
        self._blank.put(blocks)

    def _free(self, blocks: Sequence[int]) -> None:
        """Take these back, to whom nobody refers any more."""
        blank = []
        for block in blocks:
            if block in self._digest_of:
                self._cached[block] = None
            else:
                blank.append(block)
        self._blank.put(blank)
