"""Every launch and copy of PDCore is ordered wherever two share a block; each rule is needed."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from engine import LLM
from engine.handoff_queue import HandoffQueue
from engine.happens_before import Race, find_races
from engine.lease import Leases
from engine.pd_core import PDCore
from tests.checkpoints import save_random
from tests.order_log import Event, LoggedCopy, OrderLog
from tests.test_llm import greedy, run_all, small_llm

MAX_NUM_SEQS = 4
NUM_BURSTS = 4  # of requests, to each engine
NUM_SEEDS = 12  # of engines, within which a race must be found; most are in the first four
COPIED = {"slab": {"slab"}, "push": {"push"}, "auto": {"slab", "push"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("order"), "qwen3")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors as small as these, several threads mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def small_pd(folder: Path, rng: random.Random, **options: object):
    """An LLM on two CPU "devices" with few blocks, so that these soon change hands."""
    sizes = {
        "block_size": 4,
        "num_kv_blocks": rng.choice([12, 20, 30]),
        "max_num_batched_tokens": rng.choice([5, 20, 64]),
        "max_num_seqs": MAX_NUM_SEQS,
        "max_decode_backlog": rng.choice([2, 4]),
        "max_model_len": 48,
    }
    return small_llm(folder, enable_two_gpu_pd=True, **sizes | options)


def serve(llm: LLM, rng: random.Random) -> None:
    """Requests that begin alike come while others run; some are aborted."""
    shared = [rng.randrange(3, 67) for _ in range(13)]
    request_ids = []
    for _ in range(rng.randint(4, 8)):
        length = rng.randint(1, 26)
        prompt = shared[: length // 2]
        prompt += [rng.randrange(3, 67) for _ in range(length - len(prompt))]
        params = greedy(rng.choice([1, 3, 9, 20]), ignore_eos=True)
        request_ids.append(llm.add_request(prompt, params))
        for _ in range(rng.choice([0, 1, 3, 8])):
            llm.step()
        if rng.random() < 0.4:
            llm.abort(rng.choice(request_ids))
    run_all(llm)


def log_of(folder: Path, seed: int, **options: object) -> OrderLog:
    """Of one engine that serves a few times, until it is idle and once more."""
    rng = random.Random(seed)
    with small_pd(folder, rng, **options) as llm, pytest.MonkeyPatch.context() as patch:
        scheduler = llm._core.scheduler
        if options["kv_handoff"] == "auto":
            scheduler.push_tokens = 8
        log = OrderLog(llm._core, patch, rng)
        for _ in range(NUM_BURSTS):
            log.draw_speeds()
            scheduler.growth_tokens = rng.choice([0, 3, 256])
            scheduler.max_num_seqs = rng.choice([1, 2, MAX_NUM_SEQS])
            serve(llm, rng)
    return log


@pytest.mark.parametrize("is_caching", [False, True])
@pytest.mark.parametrize("kv_handoff", ["slab", "push", "auto"])
def test_every_access_is_ordered(folder, kv_handoff, is_caching):
    """Over several seeds: a rule that is broken shows in one of three of them, or fewer."""
    options = {"kv_handoff": kv_handoff, "enable_prefix_caching": is_caching}
    used: set[str] = set()
    for seed in range(8):
        log = log_of(folder, seed, **options)
        assert find_races(log.launches) == [], f"seed {seed}"
        used |= {stream for stream in ("slab", "push") if log.num_launches(stream)}
    assert used >= COPIED[kv_handoff], "what is to be ordered was not launched"


# each rule is needed: without it, what is above fails


def streams_of(races: Sequence[Race]) -> list[set[str]]:
    """The two streams of each race."""
    return [{name.split()[0] for name in (race.first, race.second)} for race in races]


def not_of(stream: str, events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.stream != stream]


def without_copy_events(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PDCore, "_events", lambda core, **_: [])


def without_fence(patch: pytest.MonkeyPatch) -> None:
    events = PDCore._events
    patch.setattr(PDCore, "_events", lambda core, **how: not_of("decode", events(core, **how)))


def without_prefill_event(patch: pytest.MonkeyPatch) -> None:
    start = HandoffQueue.start

    def start_early(queue: HandoffQueue, handoffs: Sequence, after: Sequence[Event]) -> None:
        start(queue, handoffs, not_of("prefill", after))

    patch.setattr(HandoffQueue, "start", start_early)


def without_group_event(patch: pytest.MonkeyPatch) -> None:
    push = HandoffQueue.push

    def push_early(*args) -> Callable:
        send = push(*args)
        return lambda layers, after: send(layers, not_of("prefill", after))

    patch.setattr(HandoffQueue, "push", push_early)


def without_earlier_chunks_event(patch: pytest.MonkeyPatch) -> None:
    push = HandoffQueue.push

    def push_early(queue: HandoffQueue, handoffs: Sequence, chunks: Sequence, after) -> Callable:
        return push(queue, handoffs, chunks, not_of("prefill", after))

    patch.setattr(HandoffQueue, "push", push_early)


def without_look_at_copies(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LoggedCopy, "is_done", True)


def without_wait_to_free(patch: pytest.MonkeyPatch) -> None:
    """Blocks of a request that ends go back at once, whatever is copied."""

    def close(leases: Leases, request_id: int) -> None:
        lease = leases._open.pop(request_id)
        leases._outgrown.discard(request_id)
        leases._pay(lease, lease.num_owed)
        leases._give_back(lease)
        if lease.is_copying:
            leases._closing[lease.lease_id] = lease

    patch.setattr(Leases, "close", close)


# what takes the rule out, with which hand-over, and on which streams a race is found then
RULES = {
    "all_copy_events": (without_copy_events, "push", {"prefill", "push"}),
    "event_of_a_pushed_group": (without_group_event, "push", {"prefill", "push"}),
    "event_of_earlier_chunks": (without_earlier_chunks_event, "push", {"prefill", "push"}),
    # a slab waits for prefill only where its token was not seen yet and no row was free for a push
    "prefill_event_of_a_slab": (without_prefill_event, "push", {"prefill", "slab"}),
    "fence_before_a_push": (without_fence, "push", {"decode", "push"}),
    "fence_before_a_slab": (without_fence, "slab", {"decode", "slab"}),
    "look_before_decode": (without_look_at_copies, "slab", {"decode", "slab"}),
    "wait_before_blocks_are_freed": (without_wait_to_free, "slab", {"prefill", "slab"}),
}


@pytest.mark.parametrize("rule", RULES)
def test_without_one_rule_a_race_is_found(folder, monkeypatch, rule):
    take_out, kv_handoff, streams = RULES[rule]
    take_out(monkeypatch)
    options = {"kv_handoff": kv_handoff, "enable_prefix_caching": False}
    logs = (log_of(folder, seed, **options) for seed in range(NUM_SEEDS))
    assert any(streams in streams_of(find_races(log.launches)) for log in logs)
