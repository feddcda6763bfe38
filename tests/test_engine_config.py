"""EngineConfig refuses what it must, naming the field, what is allowed and what came."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from engine.config import EngineConfig, OneDeviceWarning

BAD_OPTIONS = [
    ("device", "gpu", "auto, cpu, cuda or cuda:N"),
    ("device", "cuda:-1", "auto, cpu, cuda or cuda:N"),
    ("device", 0, "auto, cpu, cuda or cuda:N"),
    ("dtype", "float64", "one of auto, bfloat16, float16, float32"),
    ("dtype", torch.float16, "one of auto"),
    ("max_num_seqs", 0, ">= 1"),
    ("max_num_seqs", True, ">= 1"),
    ("max_num_batched_tokens", 0, ">= 1"),
    ("max_num_batched_tokens", 8.0, "integer"),
    ("max_model_len", 1, ">= 2"),
    ("block_size", 0, ">= 1"),
    ("block_size", 24, "power of two"),
    ("num_kv_blocks", 0, ">= 1"),
    ("gpu_memory_utilization", 0, "(0, 1]"),
    ("gpu_memory_utilization", 1.01, "(0, 1]"),
    ("gpu_memory_utilization", math.nan, "(0, 1]"),
    ("gpu_memory_utilization", "0.9", "(0, 1]"),
    ("enable_prefix_caching", 1, "True or False"),
    ("enforce_eager", None, "True or False"),
    ("load_format", "gguf", "auto, dummy"),
    ("kernels", "cuda", "auto, triton, reference"),
    ("tensor_parallel_size", 2, "not supported yet"),
    ("tensor_parallel_size", 0, ">= 1"),
    ("seed", 2**63, "from -9223372036854775808 to 9223372036854775807"),
    ("seed", None, "integer"),
    ("enable_two_gpu_pd", "yes", "True, False or 'auto'"),
    ("enable_two_gpu_pd", 1, "True, False or 'auto'"),
    ("prefill_device_id", -1, ">= 0"),
    ("decode_device_id", "1", ">= 0"),
    ("prefill_kv_fraction", 0, "(0, 1]"),
    ("prefill_kv_fraction", 1.5, "(0, 1]"),
    ("max_decode_backlog", 0, ">= 1"),
    ("pd_growth_tokens", -1, ">= 0"),
    ("kv_handoff", "pull", "one of auto, push, slab"),
    ("enable_decode_pipeline", 1, "True or False"),
    ("decode_pipeline", "dynamic", "one of auto, static, disabled"),
    ("decode_attention_sm", 7, ">= 8"),
    ("decode_ffn_sm", 84.0, "integer >= 8"),
    ("decode_micro_batches", 1, ">= 2"),
    ("decode_pipeline_min_requests", 0, ">= 1"),
    ("decode_pipeline_profiling", "yes", "True or False"),
    ("disable_green", None, "True or False"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), BAD_OPTIONS)
def test_bad_option_names_field_allowed_and_value(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError) as error:
        EngineConfig.from_options("m", **{name: value})
    message = str(error.value)
    assert message.startswith(name) and allowed in message
    assert message.endswith(f"got {value!r}")


def test_model_must_be_a_name() -> None:
    with pytest.raises(ValueError, match=r"model must be a name or a folder, got ''"):
        EngineConfig(model="")


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"unknown option 'max_num_seq'.*'max_num_seqs'"):
        EngineConfig.from_options("m", max_num_seq=3)


def test_options_reach_their_fields(tmp_path: Any) -> None:
    config = EngineConfig.from_options(tmp_path, max_num_batched_tokens=1, block_size=1)
    assert (config.model, config.max_num_batched_tokens) == (str(tmp_path), 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_size = 2  # type: ignore[misc]


def test_a_pipeline_needs_a_request_for_each_micro_batch() -> None:
    options = {"max_num_seqs": 2, "decode_micro_batches": 3}
    assert not EngineConfig(model="m", **options).has_decode_pipeline
    for asked in ({"enable_decode_pipeline": True}, {"decode_pipeline": "static"}):
        with pytest.raises(ValueError, match="each of the 3 micro-batches, got 2"):
            EngineConfig(model="m", **options, **asked)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"decode_pipeline": "static"}, 8),
        ({"enable_decode_pipeline": True}, 8),
        ({"enable_decode_pipeline": True, "decode_pipeline_min_requests": 3}, 3),
        ({"decode_pipeline": "static", "max_num_seqs": 64}, 16),
        ({"decode_pipeline": "auto"}, 16),
        ({"decode_pipeline": "auto", "enable_decode_pipeline": True}, 16),
    ],
)
def test_a_full_step_is_pipelined_where_that_is_asked_for(options, wanted) -> None:
    config = EngineConfig(model="m", **{"max_num_seqs": 8} | options)
    assert config.pipeline_min_requests == wanted
    assert config.has_static_pipeline == (options.get("decode_pipeline") != "auto")


@pytest.fixture(params=[0, 2])
def num_gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


def test_resolve_device(num_gpus: int) -> None:
    def resolve(device: str) -> str:
        return EngineConfig(model="m", device=device).resolve_device()

    assert resolve("cpu") == "cpu"
    assert resolve("auto") == ("cuda:0" if num_gpus else "cpu")
    if num_gpus:
        assert (resolve("cuda"), resolve("cuda:1")) == ("cuda:0", "cuda:1")
    with pytest.raises(ValueError, match=rf"device must .*found: {num_gpus}\), got 'cuda:2'"):
        resolve("cuda:2")


@pytest.mark.parametrize("two", [True, "auto"])
def test_two_devices_are_not_one_and_share_no_layer(two: bool | str) -> None:
    options = {"enable_two_gpu_pd": two}
    with pytest.raises(ValueError, match=r"decode_device_id must differ .* got 1 for both"):
        EngineConfig(model="m", prefill_device_id=1, **options)
    with pytest.raises(ValueError, match="enable_two_gpu_pd must be False where tensor_parallel"):
        EngineConfig(model="m", tensor_parallel_size=2, **options)
    EngineConfig(model="m", prefill_device_id=1)  # nobody asks for two


def two_devices(device: str, **options: Any) -> tuple[str, str] | None:
    return EngineConfig(model="m", device=device, **options).resolve_two_devices()


def test_resolve_two_devices(num_gpus: int) -> None:
    assert two_devices("auto") is None
    assert two_devices("cpu", enable_two_gpu_pd=True) == ("cpu", "cpu")
    if num_gpus:
        for two in (True, "auto"):
            assert two_devices("auto", enable_two_gpu_pd=two) == ("cuda:0", "cuda:1")
            swapped = {"prefill_device_id": 1, "decode_device_id": 0}
            assert two_devices("cuda", enable_two_gpu_pd=two, **swapped) == ("cuda:1", "cuda:0")
            with pytest.raises(ValueError, match=r"decode_device_id must be .* from 0 to 1, got 2"):
                two_devices("auto", enable_two_gpu_pd=two, decode_device_id=2)
    else:
        with pytest.raises(ValueError, match=r"needs two GPUs .* found 0, got True"):
            two_devices("auto", enable_two_gpu_pd=True)
    with pytest.raises(ValueError, match=r"device must be auto, cuda or cpu .* got 'cuda:1'"):
        two_devices("cuda:1", enable_two_gpu_pd=True)


@pytest.mark.parametrize(
    ("device", "num", "reason"),
    [("auto", 1, "found 1"), ("cuda", 0, "found 0"), ("cpu", 2, "'cpu'"), ("cuda:0", 2, "cuda:0")],
)
def test_auto_takes_one_device_and_says_so(
    device: str, num: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num)
    with pytest.warns(OneDeviceWarning, match=f"prefill and decode share one device: .*{reason}"):
        assert two_devices(device, enable_two_gpu_pd="auto") is None


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device must be cpu \(GPUs found: 0\), got 'cuda'"):
        EngineConfig(model="m", device="cuda").resolve_device()


@pytest.mark.parametrize(
    ("dtype", "checkpoint", "device", "resolved"),
    [
        ("auto", "bfloat16", "cpu", "float32"),
        ("auto", "bfloat16", "cuda:0", "bfloat16"),
        ("auto", "float16", "cuda:0", "float16"),
        ("auto", None, "cuda:0", "float32"),
        ("float16", "bfloat16", "cuda:0", "float16"),
        ("bfloat16", "float32", "cpu", "bfloat16"),
    ],
)
def test_resolve_dtype(
    dtype: str, checkpoint: str | None, device: str, resolved: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert EngineConfig(model="m", dtype=dtype).resolve_dtype(checkpoint, device) == resolved


def test_bfloat16_needs_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="dtype must be float16 or float32 on cuda:0, got 'bfl"):
        EngineConfig(model="m").resolve_dtype("bfloat16", "cuda:0")


def test_checkpoint_dtype_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'float8_e4m3fn'"):
        EngineConfig(model="m").resolve_dtype("float8_e4m3fn", "cuda:0")


def test_resolve_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert EngineConfig(model="m").resolve_kernels("cpu") == "reference"
    assert EngineConfig(model="m").resolve_kernels("cuda:0") == "triton"
    assert EngineConfig(model="m", kernels="reference").resolve_kernels("cuda:0") == "reference"
    with pytest.raises(ValueError, match=r"kernels must be reference .*TRITON_INTERPRET=1"):
        EngineConfig(model="m", kernels="triton").resolve_kernels("cpu")


def test_interpreted_kernels_refuse_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert EngineConfig(model="m", kernels="triton").resolve_kernels("cpu") == "triton"
    with pytest.raises(ValueError, match="dtype must be float16 or float32 under TRITON_INTERP"):
        EngineConfig(model="m", kernels="triton", dtype="bfloat16").resolve_kernels("cpu")
