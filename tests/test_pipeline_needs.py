"""What is seen to before CUDA starts, and refused before weights are loaded."""

import os
from types import SimpleNamespace

import pytest
import torch

from engine import LLM, llm
from engine.config import EngineConfig
from engine.pipeline_needs import (
    CONNECTIONS,
    ask_for_connections,
    check_stage_sms,
    max_connections,
)

STATIC = {"decode_pipeline": "static"}


@pytest.fixture(autouse=True)
def started(monkeypatch) -> dict[str, bool]:
    """CUDA that has started or has not, and an environment that says nothing."""
    monkeypatch.setenv(CONNECTIONS, "to be put back")
    monkeypatch.delenv(CONNECTIONS)
    state = {"cuda": False}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: state["cuda"])
    return state


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (STATIC, "32"),
        ({"enable_decode_pipeline": True, "device": "cuda:1"}, "32"),
        ({"decode_pipeline": "auto"}, "32"),
        ({}, "unset"),
        (STATIC | {"disable_green": True}, "unset"),
        (STATIC | {"device": "cpu"}, "unset"),
    ],
)
def test_cuda_starts_with_a_queue_for_each_stream_where_that_matters(options, wanted):
    ask_for_connections(EngineConfig(model="m", **options))
    assert max_connections() == wanted


def test_what_the_user_says_of_queues_stays(monkeypatch):
    monkeypatch.setenv(CONNECTIONS, "1")
    ask_for_connections(EngineConfig(model="m", **STATIC))
    assert max_connections() == "1"


def test_what_cuda_started_with_is_not_covered_up(started):
    started["cuda"] = True
    ask_for_connections(EngineConfig(model="m", **STATIC))
    assert CONNECTIONS not in os.environ and max_connections() == "unset"


@pytest.fixture
def sms(monkeypatch) -> None:
    properties = SimpleNamespace(multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize("more", [{}, {"disable_green": True}, {"kernels": "reference"}])
def test_more_sms_than_there_are_are_refused(sms, more):
    config = EngineConfig(model="m", **STATIC, **more)
    wanted = r"^decode_attention_sm \+ decode_ffn_sm .* the device's 108 SMs, got 48 \+ 84 = 132$"
    with pytest.raises(ValueError, match=wanted):
        check_stage_sms(config, "cuda:0")
    check_stage_sms(config, "cpu")
    check_stage_sms(EngineConfig(model="m", **STATIC, **more, decode_ffn_sm=60), "cuda:0")


@pytest.mark.parametrize("choice", ["auto", "disabled"])
def test_a_split_that_nobody_asked_for_is_not_refused(sms, choice):
    check_stage_sms(EngineConfig(model="m", decode_pipeline=choice), "cuda:0")


@pytest.mark.parametrize("two", [False, True])
def test_an_llm_refuses_before_it_looks_for_a_checkpoint(sms, monkeypatch, two):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    looked_for = []
    monkeypatch.setattr(llm, "resolve", looked_for.append)
    with pytest.raises(ValueError, match=r"decode_attention_sm \+ decode_ffn_sm"):
        LLM("nowhere", enable_two_gpu_pd=two, **STATIC)
    assert not looked_for
    assert max_connections() == "32"
