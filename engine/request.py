"""What is asked for (SamplingParams) and how far it has come (Request). Knows no tensors."""

import enum
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.config import INT64_MAX, INT64_MIN, check_bool, check_int, check_number

FinishReason = Literal["stop", "length", "abort", "error"]
MAX_LOGPROBS = 20
MIN_TOP_P = 2.0**-126  # the least normal fp32: below, kernels would read 0
MAX_TEMPERATURE = 3.4e38  # beyond, fp32 has infinity, and limits would keep every token
MIN_TEMPERATURE = 1e-5  # below, logits / temperature may leave the range of fp32


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn, and when it ends."""

    temperature: float = 1.0  # 0: greedy, as is anything below MIN_TEMPERATURE
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # least probability, relative to the likeliest token's
    max_tokens: int = 64
    ignore_eos: bool = False
    stop: str | Sequence[str] = ()  # text that ends the output and is not part of it
    stop_token_ids: Sequence[int] = ()
    seed: int | None = None  # None: the engine gives one
    logprobs: int | None = None  # top log-probabilities per token; 0: only the token's own

    def __post_init__(self) -> None:
        allowed = f"a finite number >= 0 and at most {MAX_TEMPERATURE:g}"
        check_number("temperature", self.temperature, allowed, 0.0, MAX_TEMPERATURE)
        check_int("top_k", self.top_k, 0, 2**31 - 1)
        check_number("top_p", self.top_p, "a number in (0, 1]", 0.0, 1.0)
        if self.top_p == 0:
            raise ValueError(f"top_p must be a number in (0, 1], got {self.top_p!r}")
        check_number("min_p", self.min_p, "a number in [0, 1]", 0.0, 1.0)
        check_int("max_tokens", self.max_tokens, 1)
        check_bool("ignore_eos", self.ignore_eos)
        if self.seed is not None:
            check_int("seed", self.seed, INT64_MIN, INT64_MAX)
        if self.logprobs is not None:
            check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.temperature < MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        object.__setattr__(self, "top_p", max(self.top_p, MIN_TOP_P))
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop must be a non-empty string or a sequence of them, got {stop!r}")
    return tuple(strings)


def _stop_token_ids(token_ids: Any) -> tuple[int, ...]:
    if not isinstance(token_ids, Collection) or isinstance(token_ids, str | bytes):
        raise ValueError(f"stop_token_ids must be a sequence of token ids, got {token_ids!r}")
    for token_id in token_ids:
        check_int("stop_token_ids", token_id, 0)
    return tuple(token_ids)


class RequestState(enum.Enum):
    """Where a request stands. A preempted one is WAITING again."""

    WAITING = enum.auto()
    PREFILLING = enum.auto()  # some of its tokens are in the cache, not yet all
    PREFILLED = enum.auto()  # on two devices: all are, in the pool that decode does not read
    COPYING = enum.auto()  # on two devices: on their way into the pool that decode reads
    DECODING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Request:
    """One prompt on its way to an output. The scheduler moves it; others only read."""

    request_id: int
    # the prompt, then every generated token that the host knows; int64
    token_ids: Sequence[int] | array
    params: SamplingParams
    seed: int = 0  # the engine's; the one in params comes first
    arrival_time: float = 0.0  # seconds, time.perf_counter, as are the four at the end

    num_prompt_tokens: int = field(init=False)
    max_total_tokens: int = field(init=False)  # prompt + generated; the scheduler lowers it
    arrival_index: int = 0  # requests that the scheduler was given before it
    num_computed_tokens: int = 0  # k and v written, or will be by work already launched
    num_cached_tokens: int = 0  # of the prompt, taken from the prefix cache at first admission
    num_in_flight: int = 0  # tokens sampled on the device that the host does not know yet
    num_preemptions: int = 0
    epoch: int = 0  # goes up when its blocks are released; results of an older one are stale
    state: RequestState = RequestState.WAITING
    finish_reason: FinishReason | None = None
    logprobs: list[Any] = field(default_factory=list)  # one entry per generated token, if asked for
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None

    def __post_init__(self) -> None:
        # not a list, through which the garbage collector would go, for milliseconds with many
        self.token_ids = array("q", self.token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.max_total_tokens = self.num_prompt_tokens + self.params.max_tokens
        if self.params.seed is not None:
            self.seed = self.params.seed

    @property
    def num_tokens(self) -> int:
        """Tokens that exist: known and in flight."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_generated(self) -> int:
        """Generated tokens that the host knows."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def generated_token_ids(self) -> list[int]:
        """The known tokens after the prompt."""
        return self.token_ids[self.num_prompt_tokens :].tolist()

    def end_reason(self, eos_token_ids: Collection[int]) -> FinishReason | None:
        """Why its newest token ends it, if it does; stop strings are the detokenizer's."""
        token_id = self.token_ids[-1]
        if token_id in self.params.stop_token_ids:
            return "stop"
        if token_id in eos_token_ids and not self.params.ignore_eos:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_total_tokens else None

    def metrics(self) -> dict[str, float | int | None]:
        """Times and counts of this request; None where there is nothing to measure yet."""
        # to the last token: who gives up waits for none, and its end may come long behind
        later_tokens_ms = _elapsed_ms(self.first_token_time, self.last_token_time)
        has_tpot = later_tokens_ms is not None and self.num_generated > 1
        return {
            "queue_ms": _elapsed_ms(self.arrival_time, self.first_scheduled_time),
            "ttft_ms": _elapsed_ms(self.arrival_time, self.first_token_time),
            "tpot_ms": later_tokens_ms / (self.num_generated - 1) if has_tpot else None,
            "latency_ms": _elapsed_ms(self.arrival_time, self.finished_time),
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_generated_tokens": self.num_generated,
            "num_cached_tokens": self.num_cached_tokens,
            "num_preemptions": self.num_preemptions,
        }


def _elapsed_ms(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else (end - start) * 1e3
