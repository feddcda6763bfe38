"""Checkpoints as transformers saves them, read into merged tensors; and every way to be wrong."""

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from models import weights as weights_module
from models.config import ModelConfig
from models.weights import check_tensors, checkpoint_slices, dummy_weights, load_weights

CLASSES = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def save_tiny(folder, family="qwen3", shard="1GB", seed=0, dtype=torch.float32, **changes):
    """A random checkpoint of two layers in `folder`, and its own tensors by name."""
    sizes = {
        "vocab_size": 48,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CLASSES[family](**sizes | changes)).to(dtype)
    for parameter in model.parameters():  # biases and norms would all be zeros and ones
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size=shard)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load(folder, dtype=torch.float32, **options):
    config = ModelConfig.from_folder(folder)
    return load_weights(config, folder, device="cpu", dtype=dtype, **options)


def tensors(weights) -> Iterator[torch.Tensor]:
    """Every merged tensor of the decoder."""
    yield from (weights.embedding, weights.final_norm, weights.lm_head)
    for layer in weights.layers:
        parts = (getattr(layer, field.name) for field in fields(layer))
        yield from (part for part in parts if part is not None)


@pytest.fixture
def tiny(tmp_path):
    save_tiny(tmp_path)
    return tmp_path


def rewrite(folder, change):
    """Let `change` alter the checkpoint's dict of tensors."""
    path = folder / "model.safetensors"
    parts = {name: part.clone() for name, part in load_file(path).items()}
    change(parts)
    save_file(parts, path)


@given(
    family=st.sampled_from(sorted(CLASSES)),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([2, 6, 16]),
    hidden=st.integers(1, 5),
    inner=st.integers(1, 33),
    tied=st.booleans(),
    bias=st.booleans(),
    sharded=st.booleans(),
    seed=st.integers(0, 99),
)
@example("llama", 3, 3, 16, 2, 32, True, False, False, 0)  # 9:3 heads, tied, as SmolLM2
@example("qwen2", 2, 7, 16, 3, 32, True, False, True, 0)  # 14:2 heads, biases, many files
@example("qwen3", 1, 1, 2, 1, 1, False, True, True, 0)  # k and v as tall as q; one inner row
def test_merged_tensors_hold_the_original_ones(
    family, num_kv_heads, group, head_dim, hidden, inner, tied, bias, sharded, seed
):
    num_heads = num_kv_heads * group
    changes = {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_size": hidden * num_heads,  # LlamaConfig wants a multiple
        "intermediate_size": inner,
        "tie_word_embeddings": tied,
    }
    if family != "qwen2":
        changes["attention_bias"] = bias
    with TemporaryDirectory() as folder:
        theirs = save_tiny(folder, family, "3KB" if sharded else "1GB", seed, **changes)
        weights = load(folder)
    embedding = theirs.pop("model.embed_tokens.weight")
    assert torch.equal(weights.embedding, embedding)
    assert torch.equal(weights.lm_head, theirs.pop("lm_head.weight", embedding))
    assert (weights.lm_head is weights.embedding) == tied
    assert torch.equal(weights.final_norm, theirs.pop("model.norm.weight"))
    for i, layer in enumerate(weights.layers):
        assert_layer_holds(layer, theirs, f"model.layers.{i}.")
    assert not theirs


def assert_layer_holds(layer, theirs, prefix):
    """Each merged tensor is the originals one below the other; none of theirs is left over."""
    parts = {
        "input_norm": ["input_layernorm.weight"],
        "qkv": [f"self_attn.{x}_proj.weight" for x in "qkv"],
        "qkv_bias": [f"self_attn.{x}_proj.bias" for x in "qkv"],
        "q_norm": ["self_attn.q_norm.weight"],
        "k_norm": ["self_attn.k_norm.weight"],
        "o": ["self_attn.o_proj.weight"],
        "o_bias": ["self_attn.o_proj.bias"],
        "post_norm": ["post_attention_layernorm.weight"],
        "gate_up": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
        "down": ["mlp.down_proj.weight"],
    }
    for field, names in parts.items():
        originals = [theirs.pop(prefix + name, None) for name in names]
        merged = getattr(layer, field)
        if merged is None:
            assert originals == [None] * len(names)
        else:
            assert torch.equal(merged, torch.cat(originals))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_weights_are_cast_once_to_the_dtype_asked_for(saved, dtype, tmp_path):
    theirs = save_tiny(tmp_path, dtype=saved)
    weights = load(tmp_path, dtype=dtype)
    assert {part.dtype for part in tensors(weights)} == {dtype}
    assert torch.equal(weights.embedding, theirs["model.embed_tokens.weight"].to(dtype))


def test_many_files_are_read_with_and_without_their_index(tmp_path):
    save_tiny(tmp_path, shard="8KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    config = ModelConfig.from_folder(tmp_path)
    indexed = load(tmp_path)
    assert check_tensors(config, tmp_path) == files
    (tmp_path / "model.safetensors.index.json").unlink()
    for a, b in zip(tensors(indexed), tensors(load(tmp_path)), strict=True):
        assert torch.equal(a, b)


def test_a_file_that_the_index_does_not_name_is_not_read(tmp_path):
    save_tiny(tmp_path, shard="8KB")
    save_file({"model.norm.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    load(tmp_path)


def test_harmless_extras_are_passed_over(tmp_path):
    save_tiny(tmp_path, tie_word_embeddings=True)
    extras = {
        "lm_head.weight": torch.zeros(48, 24),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    rewrite(tmp_path, lambda parts: parts.update(extras))
    weights = load(tmp_path)
    assert weights.lm_head is weights.embedding and weights.embedding.any()


def test_missing_extra_and_misshapen_tensors_are_named_together(tiny):
    def change(parts):
        del parts["model.layers.1.self_attn.k_proj.weight"]
        parts["model.layers.0.mlp.bogus"] = torch.zeros(2, 3)
        parts["model.norm.weight"] = torch.zeros(25)
        parts["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 24, dtype=torch.int8)

    rewrite(tiny, change)
    with pytest.raises(ValueError) as caught:
        load(tiny)
    message = str(caught.value)
    assert str(tiny) in message
    assert "model.layers.1.self_attn.k_proj.weight [8, 24] is missing" in message
    assert "model.layers.0.mlp.bogus [2, 3] is not part of" in message
    assert "model.norm.weight must be [24], got [25], in model.safetensors" in message
    assert "up_proj.weight must be one of BF16, F16, F32, F64, got I8" in message


def test_a_long_list_of_problems_is_cut(tiny):
    config = replace(ModelConfig.from_folder(tiny), num_layers=4)
    with pytest.raises(ValueError, match=r"(?s)model.layers.2.*and 14 more$") as caught:
        load_weights(config, tiny, device="cpu", dtype=torch.float32)
    assert len(str(caught.value).splitlines()) == 1 + weights_module.MAX_PROBLEMS_SHOWN + 1


def test_biases_that_the_config_denies_are_refused(tmp_path):
    save_tiny(tmp_path, "llama", attention_bias=True)
    config = replace(ModelConfig.from_folder(tmp_path), qkv_bias=False, o_bias=False)
    with pytest.raises(ValueError, match=r"q_proj.bias \[24\] is not part of a Llama"):
        check_tensors(config, tmp_path)


def test_a_tensor_that_is_twice_there_is_refused(tmp_path):
    theirs = save_tiny(tmp_path, shard="8KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": theirs["model.norm.weight"]}, tmp_path / "z.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight is twice there, in .* and z\."):
        load(tmp_path)


def test_nothing_is_allocated_before_the_check(tiny, monkeypatch):
    devices = []
    empty = weights_module._empty
    monkeypatch.setattr(
        weights_module, "_empty", lambda c, device, d: devices.append(device) or empty(c, device, d)
    )
    rewrite(tiny, lambda parts: parts.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lm_head.weight \[48, 24\] is missing"):
        load(tiny)
    assert devices == ["meta"]


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(keep, tiny):
    path = tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or truncated"):
        load(tiny)


def test_a_file_of_something_else_is_named(tiny):
    (tiny / "model.safetensors").write_bytes(b"<html>not found</html>" * 9)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or truncated"):
        load(tiny)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1'])
def test_a_damaged_index_is_named(content, tmp_path):
    save_tiny(tmp_path, shard="8KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json is damaged"):
        load(tmp_path)


def test_a_file_missing_from_the_index_is_named(tmp_path):
    save_tiny(tmp_path, shard="8KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    gone = index["weight_map"]["model.norm.weight"]
    (tmp_path / gone).unlink()
    with pytest.raises(FileNotFoundError, match=gone):
        load(tmp_path)


def test_a_folder_without_weights_says_what_was_looked_for(tiny):
    (tiny / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors.index.json and \*.safetens"):
        load(tiny)


def test_a_dtype_that_no_kernel_takes_is_refused(tiny):
    with pytest.raises(ValueError, match=r"dtype must be bfloat16, float16 or float32, got .*int8"):
        load(tiny, dtype=torch.int8)


def test_the_bar_shows_only_on_a_terminal(tiny, capsys, monkeypatch):
    load(tiny, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    load(tiny)
    assert capsys.readouterr().err == ""
    load(tiny, progress=True)
    assert "loading weights" in capsys.readouterr().err


@pytest.mark.parametrize("family", sorted(CLASSES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dummy_weights_fill_everything_and_repeat(family, dtype, tmp_path):
    save_tiny(tmp_path, family, hidden_size=126, intermediate_size=256, vocab_size=500)
    config = ModelConfig.from_folder(tmp_path)
    weights, again, other = (
        list(tensors(dummy_weights(config, device="cpu", dtype=dtype, seed=seed)))
        for seed in (0, 0, 1)
    )
    for a, b, c in zip(weights, again, other, strict=True):
        assert a.dtype == dtype and a.isfinite().all() and a.abs().max() < 10
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_dummy_weights_have_the_scale_of_their_kind(tiny):
    config = replace(
        ModelConfig.from_folder(tiny), hidden_size=256, vocab_size=999, intermediate_size=512
    )
    weights = dummy_weights(config, device="cpu", dtype=torch.float32)
    for part in (weights.embedding, weights.layers[0].qkv, weights.layers[0].gate_up):
        assert part.std().item() == pytest.approx(256**-0.5, rel=0.1)
    assert weights.layers[0].down.std().item() == pytest.approx(512**-0.5, rel=0.1)
    assert weights.final_norm.mean().item() == pytest.approx(1, abs=0.1)


def test_checkpoint_slices_cover_every_element_once(tiny):
    config = ModelConfig.from_folder(tiny)
    weights = dummy_weights(config, device="cpu", dtype=torch.float32)
    for part in checkpoint_slices(config, weights).values():
        part.zero_().add_(1)
    total = sum(part.numel() for part in checkpoint_slices(config, weights).values())
    assert all((part == 1).all() for part in tensors(weights))
    assert total == sum(part.numel() for part in tensors(weights))
