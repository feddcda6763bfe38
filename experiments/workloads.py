"""What the engine is given to do: prompts, output lengths, and when each request arrives.

Closed workloads have all requests there at once; names that end in two numbers give the tokens of
prompt and output. Open ones (`poisson-...`) arrive at random, at a rate that the caller chooses.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine import SamplingParams

MAX_TOKEN_ID = 10_000
# of a rehearsal: two prefill launches of the bench, so that long prompts do not cost seconds
REHEARSED_TOKENS = 32_768


@dataclass(frozen=True)
class Workload:
    """Prompts, how many tokens each is to be given, and when it comes."""

    prompts: list[list[int]]
    output_lens: list[int]
    arrivals: list[float] | None = None  # rising, seconds from the start; None: all at once

    @cached_property
    def params(self) -> list[SamplingParams]:
        """Temperature 0.6; every request runs to its full length."""
        return [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n) for n in self.output_lens
        ]

    def part(self, index: int, num_parts: int) -> "Workload":
        """Requests dealt out in turn: every num_parts-th from `index` on, arrivals unchanged."""
        arrivals = None if self.arrivals is None else self.arrivals[index::num_parts]
        return Workload(
            self.prompts[index::num_parts], self.output_lens[index::num_parts], arrivals
        )

    def for_each(self, num_parts: int) -> "Workload":
        """As often as there are parts, each of which is then the whole."""

        def repeated(values: list[Any]) -> list[Any]:
            return [value for value in values for _ in range(num_parts)]

        arrivals = None if self.arrivals is None else repeated(self.arrivals)
        return Workload(repeated(self.prompts), repeated(self.output_lens), arrivals)

    def rehearsal(self, max_requests: int = 64, max_tokens: int = 8) -> "Workload":
        """Its first requests, REHEARSED_TOKENS of prompts or one, cut short and all at once, to
        run before the clock does."""
        num_tokens = itertools.accumulate(map(len, self.prompts[:max_requests]))
        num_requests = max(1, sum(n <= REHEARSED_TOKENS for n in num_tokens))
        output_lens = [min(n, max_tokens) for n in self.output_lens[:num_requests]]
        return Workload(self.prompts[:num_requests], output_lens)


def offline() -> Workload:
    """256 requests of 100-1024 prompt and 100-1024 output tokens each, uniform, seed 0."""
    rng = random.Random(0)
    lens = [rng.randint(100, 1024) for _ in range(256)]
    prompts = [[rng.randint(0, MAX_TOKEN_ID) for _ in range(n)] for n in lens]
    return Workload(prompts, [rng.randint(100, 1024) for _ in range(256)])


def at_once(num_requests: int, prompt_len: int, output_len: int) -> Workload:
    """Requests of one shape, of random token ids, seed 0."""
    rng, token_ids = random.Random(0), range(MAX_TOKEN_ID + 1)
    prompts = [rng.choices(token_ids, k=prompt_len) for _ in range(num_requests)]
    return Workload(prompts, [output_len] * num_requests)


@dataclass(frozen=True)
class Poisson:
    """Requests of one shape whose gaps are exponential, seed 0.

    The trace of another rate is the same one, stretched, and longer or shorter.
    """

    prompt_len: int
    output_len: int
    seconds: float  # that arrivals go on for, on average
    num_burst_requests: int  # at once, to measure what can be sustained

    @property
    def burst_name(self) -> str:
        return f"burst-{self.prompt_len}-{self.output_len}"

    def burst(self) -> Workload:
        """The closed workload whose requests per second count as the capacity."""
        return at_once(self.num_burst_requests, self.prompt_len, self.output_len)

    def at_rate(self, rate: float) -> Workload:
        """rate: arrivals per second. ValueError unless it is positive."""
        if not rate > 0:
            raise ValueError(f"rate must be positive, got {rate}")
        closed = at_once(max(1, round(rate * self.seconds)), self.prompt_len, self.output_len)
        rng, now, arrivals = random.Random(0), 0.0, []
        for _ in closed.prompts:
            now += rng.expovariate(1.0) / rate
            arrivals.append(now)
        return Workload(closed.prompts, closed.output_lens, arrivals)


POISSON = {
    "poisson-1024-128": Poisson(1024, 128, seconds=6.0, num_burst_requests=256),
    "poisson-4096-256": Poisson(4096, 256, seconds=12.0, num_burst_requests=64),
}
CLOSED: dict[str, Callable[[], Workload]] = {
    "offline": offline,
    "batch1": lambda: at_once(1, 128, 256),
    "fixed": lambda: at_once(256, 512, 128),
    "long-prompts-256": lambda: at_once(512, 256, 64),
    "long-prompts-4096": lambda: at_once(64, 4096, 64),
    "short-prompts": lambda: at_once(1024, 32, 64),
    "decode-heavy-4": lambda: at_once(4, 16, 64),
    "decode-heavy-256": lambda: at_once(256, 16, 64),
    # some 500 ms on one H100 with Qwen3-0.6B, as the scenario of the claim it is for
    "burst-256-64": lambda: at_once(192, 256, 64),
    **{poisson.burst_name: poisson.burst for poisson in POISSON.values()},
}
BURSTS = [poisson.burst_name for poisson in POISSON.values()]
