"""What is wrong is refused by name before work starts; what else is running does not notice."""

import os
from pathlib import Path

import pytest
import torch

from engine import LLM, SamplingParams
from tests.checkpoints import NUM_BYTES, edit_config, save_byte_model, save_random
from tests.test_llm import assert_idle, greedy, run_all, small_llm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def llm(folder):
    with small_llm(folder, max_model_len=100, num_kv_blocks=20, block_size=4) as llm:
        yield llm


BAD_PROMPTS = {
    "empty text": ("", "prompt must have at least one token, got ''"),
    "no token ids": ([[]], "prompt must have at least one token, got []"),
    "longer than the cache": ([1] * 80, "prompt must be 1 to 79 tokens, one less than the smaller"),
    "far too long": ("x" * 5000, "max_model_len (80) and what the KV cache holds (80), got 5000"),
    "token id too large": ([1, 257], "prompt must have token ids from 0 to 256, got 257"),
    "negative token id": ([-1], "prompt must have token ids from 0 to 256, got -1"),
    "token id of 1e30": ([10**30], "prompt must have token ids from 0 to 256, got 1000000000"),
    "fraction": ([1.0], "prompt must have token ids from 0 to 256, got 1.0"),
    "bool": ([[True]], "prompt must have token ids from 0 to 256, got True"),
    "text in token ids": ([[1, "a"]], "prompt must have token ids from 0 to 256, got 'a'"),
    "bytes": ([b"abc"], "prompt must be a string or token ids, got bytes"),
    "a lone surrogate": ("ab\udcff", "prompt must be Unicode text, got 'ab\\udcff'"),
    "nested": ([[[1]]], "prompt must have token ids from 0 to 256, got [1]"),
}


def counts(llm: LLM) -> dict[str, object]:
    """What the engine has done, without the clocks that run on while a request is under way."""
    clocks = ("active_ms", "prefill_utilisation", "decode_utilisation")
    return {name: value for name, value in llm.stats().items() if name not in clocks}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_prompt_is_refused_and_the_others_go_on(llm, name):
    prompt, message = BAD_PROMPTS[name]
    wanted = llm.generate("abc", greedy(12, ignore_eos=True))[0]["token_ids"]
    request_id = llm.add_request("abc", greedy(12, ignore_eos=True))
    for _ in range(3):
        llm.step()
    one = prompt if isinstance(prompt, str) or type(prompt[0]) in (int, float) else prompt[0]
    calls = [
        lambda: llm.generate(prompt, greedy()),
        lambda: llm.generate(["a good one", one], greedy()),
        lambda: llm.stream(one, greedy()),
        lambda: llm.add_request(one, greedy()),
    ]
    before = counts(llm)
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        assert message in str(caught.value)
    assert counts(llm) == before, "work was done"
    assert run_all(llm)[request_id]["token_ids"] == wanted
    assert_idle(llm)


def test_the_longest_prompt_fits(llm):
    output = llm.generate([[7] * 79], greedy(5))[0]
    assert len(output["token_ids"]) == 1


BAD_PARAMS = [
    ("temperature", -0.5, "finite number >= 0"),
    ("temperature", float("nan"), "finite number >= 0"),
    ("top_p", 0.0, "(0, 1]"),
    ("top_p", 1.5, "(0, 1]"),
    ("top_k", -1, "from 0 to"),
    ("min_p", 2, "[0, 1]"),
    ("max_tokens", 0, ">= 1"),
    ("max_tokens", -3, ">= 1"),
    ("stop", "", "non-empty string"),
    ("logprobs", 21, "from 0 to 20"),
]


@pytest.mark.parametrize(("field", "value", "allowed"), BAD_PARAMS)
def test_bad_params_name_field_allowed_and_value(field, value, allowed):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert message.startswith(field) and allowed in message and message.endswith(repr(value))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 0}, "params must be SamplingParams, got dict"),
        ([SamplingParams()] * 3, "params must be one or 2, got 3"),
        ([], "params must be one or 2, got 0"),
        ([SamplingParams(), None], "params must be SamplingParams, got NoneType"),
    ],
)
def test_params_of_another_kind_or_number(llm, params, message):
    with pytest.raises(ValueError) as caught:
        llm.generate(["a", "b"], params)
    assert message in str(caught.value)
    assert_idle(llm)


@pytest.mark.parametrize("prompts", [5, None, 1.5])
def test_prompts_that_are_no_prompts(llm, prompts):
    with pytest.raises(ValueError, match=r"prompts? must"):
        llm.generate(prompts)


def test_text_that_becomes_a_token_id_out_of_the_vocabulary(tmp_path):
    """A tokenizer may know more tokens than the model: no launch may be made of them."""
    save_byte_model(tmp_path)
    save_random(tmp_path, vocab_size=100, eos_token_id=2)  # the tokenizer files stay
    with small_llm(tmp_path) as llm:
        request_id = llm.add_request("ABC", greedy(4, ignore_eos=True))
        with pytest.raises(ValueError, match=r"prompt must .*from 0 to 99, got 122"):
            llm.generate("Az", greedy(4))
        assert len(run_all(llm)[request_id]["token_ids"]) == 4


def test_text_and_stop_strings_need_a_tokenizer(tmp_path):
    with small_llm(save_random(tmp_path)) as llm:
        with pytest.raises(ValueError, match=r"prompt must be token ids.*no tokenizer.*'abc'"):
            llm.generate(["abc", [1]])
        with pytest.raises(ValueError, match=r"stop must be empty .*without tokenizer"):
            llm.generate([[1]], SamplingParams(stop="x"))
        with pytest.raises(ValueError, match="chat needs a checkpoint with a tokenizer"):
            llm.chat_prompt("hello")
        assert len(llm.generate([[1]], greedy(3, ignore_eos=True))[0]["token_ids"]) == 3


BAD_OPTIONS = [
    ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
    ({"device": "cuda:99"}, "got 'cuda:99'"),
    ({"dtype": "int8"}, "dtype must be one of auto, bfloat16, float16, float32, got 'int8'"),
    ({"dtype": torch.float16}, "dtype must be one of"),
    ({"max_model_len": 513}, "max_model_len must be at most the model's 512, got 513"),
    ({"max_model_len": 1}, "max_model_len must be an integer >= 2, got 1"),
    ({"max_num_seqs": 0}, "max_num_seqs must be an integer >= 1, got 0"),
    ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be an integer >= 1, got 0"),
    ({"block_size": 12}, "block_size must be a power of two, got 12"),
    ({"num_kv_blocks": 0}, "num_kv_blocks must be an integer >= 1, got 0"),
    ({"num_kv_blocks": 1, "block_size": 1}, "num_kv_blocks"),
    ({"gpu_memory_utilization": 1.2}, "gpu_memory_utilization must be a number in (0, 1], got 1.2"),
    ({"load_format": "pt"}, "load_format must be one of auto, dummy, got 'pt'"),
    ({"kernels": "cuda"}, "kernels must be one of auto, triton, reference, got 'cuda'"),
    ({"tensor_parallel_size": 2}, "tensor_parallel_size must be 1 (more is not supported yet)"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda x: str(x)[:30])
def test_a_bad_option_is_refused(folder, options, message):
    with pytest.raises(ValueError) as caught:
        LLM(folder, **{"device": "cpu", "num_kv_blocks": 8} | options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"max_model_len": 513}, {"device": "cuda:99"}, {"num_kv_blocks": 1, "block_size": 1}],
)
def test_options_are_checked_before_weights_are_read(folder, options, monkeypatch):
    read = []
    monkeypatch.setattr("engine.build.load_weights", lambda *args, **kwargs: read.append(args))
    with pytest.raises(ValueError):
        LLM(folder, **{"device": "cpu", "num_kv_blocks": 8} | options)
    assert not read


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("max_num_seq", "max_num_seqs"),
        ("max_tokens", "max_num_batched_tokens"),
        ("kernel", "kernels"),
    ],
)
def test_an_unknown_option_names_the_nearest(option, nearest):
    with pytest.raises(
        TypeError, match=rf"unknown option '{option}'; the nearest one is '{nearest}'"
    ):
        LLM("nowhere", **{option: 1})


def test_a_gpu_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:0", "cuda:3"):
        with pytest.raises(ValueError, match=rf"device must be cpu .*found: 0\), got '{device}'"):
            LLM(folder, device=device)


def test_kernels_and_dtypes_that_a_cpu_lacks(folder, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"dtype must be float16 or float32 .*got 'bfloat16'"):
        LLM(folder, device="cpu", kernels="triton", dtype="bfloat16")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"kernels must be reference .*got 'triton'"):
        LLM(folder, device="cpu", kernels="triton")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_references_take_every_dtype_on_a_cpu(folder, dtype):
    with small_llm(folder, dtype=dtype) as llm:
        assert len(llm.generate("abc", greedy(4, ignore_eos=True))[0]["token_ids"]) == 4


def open_llm(folder):
    return LLM(folder, device="cpu", num_kv_blocks=8)


def test_a_folder_that_is_not_there_or_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint folder: .*nowhere"):
        open_llm(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        open_llm(tmp_path)
    for name in ("smollm2", "org/name"):  # a Path is never a name
        with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
            open_llm(Path(name))
    with pytest.raises(ValueError, match="model must be a name or a folder, got ''"):
        open_llm("")
    with pytest.raises(
        ValueError, match=r"model must be a checkpoint folder, .*got 'no-such-model'"
    ):
        open_llm("no-such-model")


def test_an_unknown_architecture_gets_the_list(tmp_path):
    edit_config(save_random(tmp_path), architectures=["MambaForCausalLM"])
    with pytest.raises(ValueError, match=r"Llama.*Qwen2.*Qwen3.*MambaForCausalLM"):
        open_llm(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_checkpoint_is_named(tmp_path, keep):
    path = save_random(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        open_llm(tmp_path)


def test_weights_of_another_shape_are_named(tmp_path):
    edit_config(save_random(tmp_path), intermediate_size=41)
    with pytest.raises(
        ValueError, match=r"mlp\.down_proj\.weight must be \[24, 41\], got \[24, 40"
    ):
        open_llm(tmp_path)


def test_a_checkpoint_without_weights(tmp_path):
    os.remove(save_random(tmp_path) / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds no weights: looked for model\.safetensors"):
        open_llm(tmp_path)
    with LLM(tmp_path, device="cpu", num_kv_blocks=8, load_format="dummy") as llm:
        assert len(llm.generate([[1]], greedy(3, ignore_eos=True))[0]["token_ids"]) == 3


@pytest.mark.parametrize("content", ["", "{", '{"model": 3}'])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    (save_byte_model(tmp_path) / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*tokenizer files cannot be read"):
        open_llm(tmp_path)


def test_a_refused_llm_holds_no_memory_and_the_next_one_works(folder, tmp_path):
    for _ in range(3):
        with pytest.raises(ValueError):
            LLM(folder, device="cpu", num_kv_blocks=8, max_model_len=10**6)
    with small_llm(folder) as llm:
        assert llm.generate([[NUM_BYTES - 1]], greedy(2, ignore_eos=True))


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ("ab\ud800", r"message must be Unicode text, got 'ab\\ud800'"),
        (5, "message must be a string, got int"),
        (None, "message must be a string, got NoneType"),
    ],
)
def test_a_chat_message_that_is_no_text(llm, message, says):
    with pytest.raises(ValueError, match=says):
        llm.chat_prompt(message)
