"""SamplingParams refuses what it must; Request counts and times."""

import math
from typing import Any

import numpy as np
import pytest

from engine.request import Request, SamplingParams

BAD_PARAMS = [
    ("temperature", -0.1, "finite number >= 0"),
    ("temperature", math.nan, "finite number >= 0"),
    ("temperature", math.inf, "finite number >= 0"),
    ("temperature", 1e39, "at most 3.4e+38"),
    ("temperature", "1", "finite number >= 0"),
    ("temperature", True, "finite number >= 0"),
    ("top_k", -1, "integer from 0"),
    ("top_k", 1.0, "integer from 0"),
    ("top_p", 0, "(0, 1]"),
    ("top_p", 1.1, "(0, 1]"),
    ("top_p", math.nan, "(0, 1]"),
    ("min_p", -0.1, "[0, 1]"),
    ("min_p", 1.1, "[0, 1]"),
    ("max_tokens", 0, ">= 1"),
    ("max_tokens", True, ">= 1"),
    ("max_tokens", None, ">= 1"),
    ("ignore_eos", 1, "True or False"),
    ("stop", "", "non-empty string"),
    ("stop", ["a", ""], "non-empty string"),
    ("stop", ["a", 1], "non-empty string"),
    ("stop", None, "non-empty string"),
    ("stop_token_ids", 5, "sequence of token ids"),
    ("stop_token_ids", "5", "sequence of token ids"),
    ("seed", 2**63, "from -9223372036854775808 to"),
    ("seed", 0.5, "integer"),
    ("logprobs", 21, "from 0 to 20"),
    ("logprobs", -1, "from 0 to 20"),
    ("logprobs", True, "from 0 to 20"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD_PARAMS)
def test_bad_parameter_names_field_allowed_and_value(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert message.startswith(name) and allowed in message
    assert message.endswith(f"got {value!r}")


def test_bad_stop_token_id_names_the_one() -> None:
    with pytest.raises(ValueError, match="stop_token_ids must be an integer >= 0, got -2"):
        SamplingParams(stop_token_ids=[1, -2])


def test_sequences_become_tuples() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)
    assert hash(SamplingParams(stop=["a"])) == hash(SamplingParams(stop=("a",)))


def test_numpy_numbers_are_numbers() -> None:
    params = SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.5))
    assert params.max_tokens == 3


@pytest.mark.parametrize(("own", "resolved"), [(None, 7), (0, 0), (-1, -1)])
def test_own_seed_comes_first(own: int | None, resolved: int) -> None:
    assert Request(0, [1], SamplingParams(seed=own), seed=7).seed == resolved


def test_request_keeps_its_own_list() -> None:
    prompt = [1, 2]
    request = Request(0, prompt, SamplingParams())
    request.token_ids.append(3)
    assert prompt == [1, 2]
    assert (request.num_generated, request.generated_token_ids) == (1, [3])


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        (SamplingParams(max_tokens=5), "stop"),
        (SamplingParams(max_tokens=5, ignore_eos=True), None),
        (SamplingParams(max_tokens=1, ignore_eos=True), "length"),
        (SamplingParams(max_tokens=1), "stop"),
        (SamplingParams(max_tokens=5, ignore_eos=True, stop_token_ids=[9]), "stop"),
    ],
)
def test_end_reason_of_an_eos_token(params: SamplingParams, reason: str | None) -> None:
    request = Request(0, [1, 2], params)
    request.token_ids.append(9)
    assert request.end_reason({9}) == reason


def test_metrics() -> None:
    request = Request(0, [1, 2], SamplingParams(), arrival_time=1.0)
    assert request.metrics()["ttft_ms"] is None and request.metrics()["tpot_ms"] is None
    request.first_scheduled_time, request.first_token_time = 1.5, 2.0
    request.finished_time = 2.0
    request.token_ids.append(3)
    assert request.metrics()["tpot_ms"] is None  # one token has no time per later token
    request.token_ids.extend([4, 5])
    request.last_token_time, request.finished_time = 3.0, 4.0  # who gave up later waits for none
    assert request.metrics() == {
        "queue_ms": 500.0,
        "ttft_ms": 1000.0,
        "tpot_ms": 500.0,
        "latency_ms": 3000.0,
        "num_prompt_tokens": 2,
        "num_generated_tokens": 3,
        "num_cached_tokens": 0,
        "num_preemptions": 0,
    }
