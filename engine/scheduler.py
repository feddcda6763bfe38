"""Who is prefilled and who is decoded next, on one device. Knows nothing of tensors or devices."""

from collections.abc import Callable

from engine.base_scheduler import BaseScheduler
from engine.block_manager import BlockManager
from engine.request import Request, RequestState


class Scheduler(BaseScheduler):
    """One pool for prompts and outputs; under pressure the last to come gives its blocks back.

    Those that hold blocks arrived before those that wait.
    """

    state_after_prefill = RequestState.DECODING

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        on_release: Callable[[Request], None] | None = None,
    ):
        """max_num_seqs: requests that may hold blocks; the others, and errors: see the base."""
        super().__init__(
            block_manager,
            block_manager.num_blocks * block_manager.block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            on_release=on_release,
        )

    def _may_admit(self, request: Request) -> bool:
        return self.num_running < self.max_num_seqs

    def _room(self) -> tuple[int, ...]:
        # a block for each running request, or the newcomer would soon be preempted
        return (self.block_manager.num_free_blocks - self.num_running,)

    def _grant(self, request: Request) -> int | None:
        keep_free = self.num_running
        return self.block_manager.admit(request.request_id, request.token_ids, keep_free=keep_free)

    def _commit(self, request: Request, num_computed: int) -> None:
        self.block_manager.commit(request.request_id, request.token_ids, num_computed)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        return self.block_manager.grow(request.request_id, num_tokens)

    def _return_blocks(self, request: Request) -> None:
        self.block_manager.release(request.request_id)

    def _first_token_known(self, request: Request) -> None:
        """Nothing waits for it: requests decode from their prefill on."""
