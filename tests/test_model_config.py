"""config.json, in both dialects, against what transformers makes of the same file."""

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from models.config import FAMILIES, ModelConfig, RopeScaling, rope_table

CLASSES = {
    "LlamaForCausalLM": LlamaConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}
SIZES = {
    "vocab_size": 128,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def fields(architecture="Qwen3ForCausalLM", **changes):
    merged = {"architectures": [architecture], **SIZES, "head_dim": 32, **changes}
    return {key: value for key, value in merged.items() if value is not ...}


def write(folder, **changes):
    (folder / "config.json").write_text(json.dumps(fields(**changes)))
    return folder


@pytest.mark.parametrize("architecture", FAMILIES)
def test_silent_fields_are_filled_as_transformers_fills_them(architecture, tmp_path):
    silent = {"num_key_value_heads": ..., "head_dim": ..., "num_attention_heads": 32}
    bare = fields(architecture, hidden_size=2048, **silent)
    model_type = FAMILIES[architecture].model_type
    (tmp_path / "config.json").write_text(json.dumps(bare | {"model_type": model_type}))
    config, theirs = ModelConfig.from_folder(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == getattr(theirs, "head_dim", 2048 // 32)
    assert config.max_position_embeddings == theirs.max_position_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.rope_scaling is None
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert config.qkv_bias == (architecture == "Qwen2ForCausalLM")
    assert (config.o_bias, config.dtype) == (False, "float32")
    assert config.qk_norm == (architecture == "Qwen3ForCausalLM")


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
def test_what_transformers_saves_is_read_back(architecture, rope, tmp_path):
    saved = CLASSES[architecture](
        **SIZES,
        architectures=[architecture],
        rope_parameters={**rope, "rope_theta": 5e5},
        tie_word_embeddings=True,
        eos_token_id=[7, 9],
        dtype=torch.bfloat16,
    )
    saved.save_pretrained(tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    assert (config.rope_theta, config.dtype) == (5e5, "bfloat16")
    assert config.torch_dtype is torch.bfloat16
    assert config.eos_token_ids == (7, 9)
    assert config.tie_word_embeddings
    assert (config.num_layers, config.group_size) == (2, 3)
    assert (config.rope_scaling is None) == (rope["rope_type"] == "default")


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3])
def test_both_dialects_say_the_same(scaling, type_key):
    old_scaling = scaling and {type_key if k == "rope_type" else k: scaling[k] for k in scaling}
    old = fields(rope_theta=1e6, rope_scaling=old_scaling, torch_dtype="float16")
    new = fields(
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, **(scaling or {})},
        dtype="float16",
    )
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)
    assert (ModelConfig.from_dict(old).rope_scaling is None) == (scaling is None)


def test_model_type_stands_in_for_absent_architectures():
    config = ModelConfig.from_dict(fields(architectures=..., model_type="qwen2"))
    assert config.architecture == "Qwen2ForCausalLM"


def test_attention_bias_covers_all_four_projections_but_for_qwen2():
    for architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"):
        config = ModelConfig.from_dict(fields(architecture, attention_bias=True))
        assert config.qkv_bias and config.o_bias
    config = ModelConfig.from_dict(fields("Qwen2ForCausalLM", attention_bias=True))
    assert config.qkv_bias and not config.o_bias


def test_null_kv_heads_are_as_many_as_heads():
    assert ModelConfig.from_dict(fields(num_key_value_heads=None)).num_kv_heads == 6


def test_sizes_of_the_cache():
    config = ModelConfig.from_dict(fields())
    assert config.qkv_size == (6 + 2 * 2) * 32
    assert config.kv_bytes_per_token(2) == 2 * 2 * 2 * 32 * 2  # k and v, layers, heads, D, bytes


@pytest.mark.parametrize(
    ("ids", "generation_ids", "wanted"),
    [
        (5, [6, 5], (5, 6)),
        ([1, 2], 3, (1, 2, 3)),
        (..., 4, (4,)),  # Llama's own default of 2 must not come on top
        (..., None, (2,)),
        (None, None, ()),
        (None, [8], (8,)),
    ],
)
def test_end_ids_of_both_files_are_joined(ids, generation_ids, wanted, tmp_path):
    write(tmp_path, architecture="LlamaForCausalLM", eos_token_id=ids)
    generation = json.dumps({"eos_token_id": generation_ids})
    (tmp_path / "generation_config.json").write_text(generation)
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == wanted


REFUSED = [
    ({"architectures": ["GPT2LMHeadModel"]}, r"architectures.*Llama.*Qwen2.*Qwen3.*GPT2LMHead"),
    ({"architectures": ...}, r"architectures must be one of .*model_type None"),
    ({"hidden_act": "gelu"}, r"hidden_act must be 'silu', got 'gelu'"),
    ({"mlp_bias": True}, r"mlp_bias must be false"),
    ({"attention_bias": "yes"}, r"attention_bias must be true or false, got 'yes'"),
    ({"use_sliding_window": True}, r"use_sliding_window must be false"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types .*sliding_attention"),
    ({"quantization_config": {"quant_method": "awq"}}, r"quantization_config .*awq"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope_type .*llama3, got 'yarn'"),
    ({"rope_scaling": {"rope_type": "linear"}}, r"factor is missing"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, r"factor must be a positive number, got 0"),
    ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, r"low_freq_factor must be less"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"one flat object"),
    ({"rope_parameters": [1]}, r"one flat object"),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor must be 1"),
    ({"num_key_value_heads": 4}, r"multiple of num_key_value_heads, got 6 and 4"),
    ({"head_dim": 33}, r"head_dim must be even.*33"),
    ({"head_dim": 0}, r"head_dim must be a positive integer, got 0"),
    ({"vocab_size": -1}, r"vocab_size must be a positive integer, got -1"),
    ({"hidden_size": 96.5}, r"hidden_size must be a positive integer, got 96.5"),
    ({"num_hidden_layers": True}, r"num_hidden_layers must be a positive integer, got True"),
    ({"rms_norm_eps": 0}, r"rms_norm_eps must be a positive number, got 0"),
    ({"rope_theta": float("inf")}, r"rope_theta must be a positive number, got inf"),
    ({"dtype": "float8_e4m3fn"}, r"dtype must be one of .*got 'float8_e4m3fn'"),
    ({"eos_token_id": "</s>"}, r"eos_token_id must be .*</s>"),
    *(({key: ...}, f"{key} is missing") for key in SIZES if key != "num_key_value_heads"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_run_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(fields(**changes))
    with pytest.raises(ValueError, match=rf"(?s){tmp_path.name}.*{message}"):
        ModelConfig.from_folder(write(tmp_path, **changes))


def test_hidden_size_must_divide_where_it_gives_head_dim():
    with pytest.raises(ValueError, match="hidden_size must be a multiple"):
        ModelConfig.from_dict(fields("LlamaForCausalLM", head_dim=..., hidden_size=100))


@pytest.mark.parametrize("rope_type", ["dynamic", "default"])
def test_unknown_scaling_is_refused_by_the_dataclass_too(rope_type):
    with pytest.raises(ValueError, match=f"rope_type must be linear or llama3, got '{rope_type}'"):
        RopeScaling(rope_type=rope_type, factor=2.0)


def test_absent_folder_and_absent_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ModelConfig.from_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path.name} .*no config.json"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b'{"vocab_size": 1', b"", b"\xff\xfe\x00", b"[1, 2]"])
def test_damaged_json_is_named(name, content, tmp_path):
    write(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"/{name}"):
        ModelConfig.from_folder(tmp_path)


@given(
    head_dim=st.integers(1, 96).map(lambda half: 2 * half),
    theta=st.sampled_from([1e4, 1e5, 5e5, 1e6]),
    scaling=st.sampled_from([None, {"rope_type": "linear", "factor": 3.0}, LLAMA3]),
    max_len=st.integers(1, 600),
)
@example(head_dim=64, theta=5e5, scaling=LLAMA3, max_len=4096)  # all three bands of llama3
@example(head_dim=64, theta=1e5, scaling=None, max_len=8192)  # SmolLM2
def test_rope_table_matches_transformers(head_dim, theta, scaling, max_len):
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    theirs = LlamaRotaryEmbedding(LlamaConfig(head_dim=head_dim, rope_parameters=dict(rope)))
    cos, sin = theirs(torch.zeros(1), torch.arange(max_len)[None])
    half = head_dim // 2
    wanted = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)
    config = ModelConfig.from_dict(fields(head_dim=head_dim, rope_parameters=rope))
    # the same fp32 operations give the same angles; cos and sin of them differ by an ulp at most
    torch.testing.assert_close(rope_table(config, max_len, "cpu"), wanted, rtol=1e-6, atol=2e-7)
