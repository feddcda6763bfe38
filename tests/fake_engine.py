"""What tests of schedulers share: a model in plain Python, the engine's duties, a state machine."""

from collections.abc import Iterable
from hashlib import blake2b

import pytest
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine.base_scheduler import BaseScheduler
from engine.request import Request, RequestState, SamplingParams

EOS, VOCAB = 0, 61
Result = tuple[Request, int, int]  # request, sampled token, the epoch of its launch


def mix(previous: bytes, token_id: int) -> bytes:
    """What the fake model writes to the cache: it depends on every token so far."""
    return blake2b(previous + bytes([token_id]), digest_size=8).digest()


def sample(cell: bytes) -> int:
    return cell[0] % VOCAB


def expected_tokens(prompt: list[int], max_total_tokens: int) -> list[int]:
    """The fake model's output, computed without scheduler, cache or batch."""
    cell, generated = b"", []
    for token_id in prompt:
        cell = mix(cell, token_id)
    while len(prompt) + len(generated) < max_total_tokens:
        generated.append(sample(cell))
        if generated[-1] == EOS:
            break
        cell = mix(cell, generated[-1])
    return generated


def check_running(scheduler: BaseScheduler) -> None:
    """Those that run are in the order of arrival, which decode and preemption rely on."""
    indices = [request.arrival_index for request in scheduler.running.values()]
    assert indices == sorted(indices)


class FakeEngine:
    """A scheduler and its requests; subclasses bring the devices."""

    def __init__(self, scheduler: BaseScheduler):
        self.scheduler = scheduler
        self.requests: list[Request] = []
        self.rows: dict[int, int] = {}  # newest token of each request, on the (decode) device

    def add(self, prompt: list[int], max_tokens: int) -> Request:
        request = Request(len(self.requests), prompt, SamplingParams(max_tokens=max_tokens))
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def drop_row(self, request: Request) -> None:
        self.rows.pop(request.request_id, None)

    def requeue(self, requests: Iterable[Request]) -> None:
        """What the engine does after a launch that raised."""
        for request in reversed(list(dict.fromkeys(requests))):
            self.scheduler.preempt(request)

    def record(self, results: Iterable[Result]) -> None:
        """Take the tokens of one launch, and end the requests that they end."""
        for request, token_id, epoch in results:
            if self.scheduler.record_token(request, token_id, epoch):
                reason = request.end_reason({EOS})
                if reason is not None:
                    self.scheduler.finish(request, reason)

    def step_to_end(self, steps_per_token: int) -> None:
        """Step until every request has ended; the oldest gains a token every few steps."""
        num_left = sum(request.max_total_tokens for request in self.requests)
        for _ in range(num_left * steps_per_token + steps_per_token):
            if self.scheduler.is_idle:
                break
            self.step()
            self.check()
        assert self.scheduler.is_idle, "a request waits for ever"

    def check_outputs(self) -> None:
        assert not self.rows, "a row was not given back"
        for request in self.requests:
            self.check_output(request)

    def check_output(self, request: Request) -> None:
        assert request.state is RequestState.FINISHED
        prompt = list(request.token_ids[: request.num_prompt_tokens])
        wanted = expected_tokens(prompt, request.max_total_tokens)
        if request.finish_reason in ("abort", "error"):
            wanted = wanted[: request.num_generated]
        else:
            assert request.finish_reason == ("stop" if wanted[-1] == EOS else "length")
        assert request.generated_token_ids == wanted


class EngineMachine(RuleBasedStateMachine):
    """Requests come and are aborted; subclasses start `self.engine` and drive it."""

    engine: FakeEngine

    @rule(
        length=st.integers(1, 20), shared=st.integers(0, 20), seed=st.integers(1, 5),
        max_tokens=st.integers(1, 20),
    )  # fmt: skip
    def add(self, length: int, shared: int, seed: int, max_tokens: int) -> None:
        scheduler = self.engine.scheduler
        prompt = [1] * min(shared, length) + [seed] * (length - shared)
        if length >= min(scheduler.capacity, scheduler.max_model_len):
            with pytest.raises(ValueError, match="prompt must be 1 to"):
                scheduler.add(Request(999, prompt, SamplingParams(max_tokens=max_tokens)))
        else:
            self.engine.add(prompt, max_tokens)

    @rule(choice=st.integers(0, 99))
    def abort(self, choice: int) -> None:
        if self.engine.requests:
            self.abort_one(self.engine.requests[-1 - choice % len(self.engine.requests)])

    def abort_one(self, request: Request) -> None:
        was_finished, reason = request.state is RequestState.FINISHED, request.finish_reason
        event(f"aborted while {request.state.name}")
        self.engine.scheduler.finish(request, "abort")
        assert request.finish_reason == (reason if was_finished else "abort")

    @invariant()
    def everything_adds_up(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.run_to_end()
            requests = self.engine.requests
            event(f"preempted: {any(r.num_preemptions for r in requests)}")
            event(f"prefix found: {any(r.num_cached_tokens for r in requests)}")
