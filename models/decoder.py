"""The decoder of the Qwen3, Qwen2 and Llama families, cut into stages that work in given buffers.

A layer is two stages: `attention_stage` (input norm, QKV, QK-norm + RoPE + KV store, attention) and
`ffn_stage` (output projection + residual, post norm + MLP + residual). Between them lie only the
buffers of the caller, so that either may run on another stream, device or share of the SMs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from models.config import ModelConfig, rope_table
from models.weights import DecoderWeights, fold_norms

TILE_ROWS = 256  # what `linear` reads is a multiple of: it is faster where its tiles end within


@dataclass(frozen=True, kw_only=True)
class AttentionBatch:
    """Where the tokens of one launch stand: new tokens of one request after another, or, without
    cu_seqlens, one token of each request."""

    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64, block * block_size + offset; negative: not stored
    block_table: Tensor  # [B, max_blocks] int32
    context_lens: Tensor  # [B] int32, tokens in the cache, these included
    cu_seqlens: Tensor | None = None  # [B + 1] int32
    max_query_len: int = 1


@dataclass(frozen=True, kw_only=True)
class StageBuffers:
    """What the stages of one micro-batch read and write; nothing is allocated while they run."""

    hidden: Tensor  # [T, N], the residual stream
    rstd: Tensor  # [T] fp32, scratch of the fused norms
    normed: Tensor  # [B, N], what the LM head reads
    qkv: Tensor  # [T, (H + 2 * H_KV) * D]
    q: Tensor  # [T, H, D]
    attention: Tensor  # [T, H, D]
    act: Tensor  # [T, I]
    logits: Tensor  # [B, V]
    workspace: Any  # scratch of decode attention, None where it needs none
    # scratch of products, which may run beside each other; None where they need none
    qkv_workspace: Any
    o_workspace: Any
    mlp_workspace: Any
    sample_workspace: Any  # scratch of sampling, None where it needs none

    def first(self, num_tokens: int, num_rows: int) -> "StageBuffers":
        """The same buffers, cut to the launch's tokens and sampled rows."""
        return self._cut(slice(num_tokens), slice(num_rows))

    def micro_batch(self, rows: slice) -> "StageBuffers":
        """The same buffers, cut to some of the rows of a step with one token a row.

        Micro-batches of other rows share none of it but the scratch of attention, of each product
        and of sampling.
        """
        return self._cut(rows, rows)

    def _cut(self, tokens: slice, rows: slice) -> "StageBuffers":
        cut = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("hidden", "rstd", "qkv", "q", "attention", "act"):
            cut[name] = cut[name][tokens]
        return StageBuffers(**cut | {"logits": self.logits[rows]})


class Decoder:
    """Weights, a RoPE table and the kernels to run them with. Holds no state of any request."""

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, max_len: int, ops: ModuleType
    ) -> None:
        """max_len: positions to prepare RoPE for; ops: `kernels` or `kernels.reference`.

        The layers' norm weights are folded, in place, into the matrices behind them.
        """
        self.config = config
        self.weights = weights
        fold_norms(weights)
        self.ops = ops
        self.scale = 1.0 / math.sqrt(config.head_dim)
        self.cos_sin = rope_table(config, max_len, weights.embedding.device)

    def buffers(
        self, max_tokens: int, max_rows: int, *, block_size: int | None = None
    ) -> StageBuffers:
        """Buffers for launches of up to max_tokens tokens and max_rows sampled rows. block_size:
        tokens of the KV blocks that decode attention will read; None: for prefill alone."""
        c, embedding = self.config, self.weights.embedding

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=embedding.dtype, device=embedding.device)

        def top_of_tiles(rows: int, *shape: int) -> Tensor:
            return empty(_up_to(rows, TILE_ROWS), *shape)[:rows]

        workspace = None
        if block_size is not None:
            heads = c.num_heads, c.num_kv_heads, c.head_dim
            max_context = _up_to(len(self.cos_sin), block_size)
            options = {"device": embedding.device, "max_context": max_context}
            workspace = self.ops.decode_workspace(*heads, **options)
        return StageBuffers(
            hidden=top_of_tiles(max_tokens, c.hidden_size),
            rstd=torch.empty(max_tokens, dtype=torch.float32, device=embedding.device),
            normed=top_of_tiles(max_rows, c.hidden_size),
            qkv=empty(max_tokens, c.qkv_size),
            q=empty(max_tokens, c.num_heads, c.head_dim),
            attention=top_of_tiles(max_tokens, c.num_heads, c.head_dim),
            act=top_of_tiles(max_tokens, c.intermediate_size),
            logits=empty(max_rows, c.vocab_size),
            workspace=workspace,
            qkv_workspace=self.ops.matmul_workspace(embedding.device),
            o_workspace=self.ops.matmul_workspace(embedding.device),
            mlp_workspace=self.ops.matmul_workspace(embedding.device),
            sample_workspace=self.ops.sample_workspace(max_rows, c.vocab_size, embedding.device),
        )

    def embed(self, token_ids: Tensor, buffers: StageBuffers) -> None:
        """token_ids: [T] int64 -> buffers.hidden."""
        torch.index_select(self.weights.embedding, 0, token_ids, out=buffers.hidden)

    def attention_stage(
        self, layer: int, buffers: StageBuffers, batch: AttentionBatch, kv_cache: Tensor
    ) -> None:
        """buffers.hidden -> buffers.attention. kv_cache: this layer's [num_blocks, 2, block_size,
        H_KV, D]; the tokens' k and v are stored there first."""
        self.project_qkv(layer, buffers)
        self.attend(layer, buffers, batch, kv_cache)

    def project_qkv(self, layer: int, buffers: StageBuffers, *, num_sms: int | None = None) -> None:
        """buffers.hidden -> buffers.qkv, the input norm included. num_sms: SMs that the launch may
        count on, here as below; None: all of the device."""
        w = self.weights.layers[layer]
        self.ops.linear(
            buffers.hidden,
            w.qkv,
            w.qkv_bias,
            rms_eps=self.config.rms_norm_eps,
            rstd=buffers.rstd,
            out=buffers.qkv,
            **_given(num_sms=num_sms, workspace=buffers.qkv_workspace),
        )

    def attend(
        self,
        layer: int,
        buffers: StageBuffers,
        batch: AttentionBatch,
        kv_cache: Tensor,
        *,
        num_sms: int | None = None,
    ) -> None:
        """buffers.qkv -> buffers.attention, by way of buffers.q and the tokens' place in kv_cache.
        num_sms counts for a token of each request alone; prefill takes what there is."""
        w = self.weights.layers[layer]
        self.ops.rope_store(
            buffers.qkv,
            batch.positions,
            self.cos_sin,
            batch.slot_mapping,
            kv_cache,
            w.q_norm,
            w.k_norm,
            self.config.rms_norm_eps,
            out=buffers.q,
        )
        if batch.cu_seqlens is None:
            self.ops.decode_attention(
                buffers.q,
                kv_cache,
                batch.block_table,
                batch.context_lens,
                self.scale,
                workspace=buffers.workspace,
                out=buffers.attention,
                **_given(num_sms=num_sms),
            )
        else:
            self.ops.prefill_attention(
                buffers.q,
                kv_cache,
                batch.block_table,
                batch.cu_seqlens,
                batch.context_lens,
                batch.max_query_len,
                self.scale,
                out=buffers.attention,
            )

    def ffn_stage(self, layer: int, buffers: StageBuffers) -> None:
        """buffers.attention, buffers.hidden -> buffers.hidden."""
        self.project_o(layer, buffers)
        self.mlp(layer, buffers)

    def project_o(self, layer: int, buffers: StageBuffers, *, num_sms: int | None = None) -> None:
        """buffers.hidden += the output projection of buffers.attention."""
        w, attention = self.weights.layers[layer], buffers.attention.flatten(1)
        hidden = buffers.hidden
        options = _given(num_sms=num_sms, workspace=buffers.o_workspace)
        self.ops.linear(attention, w.o, w.o_bias, hidden, out=hidden, **options)

    def mlp(self, layer: int, buffers: StageBuffers, *, num_sms: int | None = None) -> None:
        """buffers.hidden += the MLP of it, the post-attention norm included."""
        w = self.weights.layers[layer]
        self.ops.mlp(
            buffers.hidden,
            w.gate_up,
            w.down,
            self.config.rms_norm_eps,
            rstd=buffers.rstd,
            act=buffers.act,
            out=buffers.hidden,
            **_given(num_sms=num_sms, workspace=buffers.mlp_workspace),
        )

    def layers(
        self, buffers: StageBuffers, batch: AttentionBatch, kv_layers: Sequence[Tensor]
    ) -> None:
        """Every layer in turn, its two stages one after the other. kv_layers: [L] layer views."""
        for layer, kv_cache in enumerate(kv_layers):
            self.attention_stage(layer, buffers, batch, kv_cache)
            self.ffn_stage(layer, buffers)

    def lm_head(self, hidden: Tensor, buffers: StageBuffers) -> Tensor:
        """Final norm and vocabulary projection. hidden: [B, N] -> buffers.logits [B, V]."""
        # the head may be the embedding itself, so that this norm's weight cannot be folded into it
        normed = self.ops.rms_norm(
            hidden,
            self.weights.final_norm,
            self.config.rms_norm_eps,
            out=buffers.normed[: len(hidden)],
        )
        return self.ops.linear(normed, self.weights.lm_head, out=buffers.logits)


def _up_to(n: int, whole: int) -> int:
    """n, or the next multiple of `whole`."""
    return -(-n // whole) * whole


def _given(**options: Any) -> dict[str, Any]:
    """Those of the launchers' own arguments that are there; the references know none of them."""
    return {name: value for name, value in options.items() if value is not None}
