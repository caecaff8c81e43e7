"""Llama in flax.linen: RMSNorm, Attention, MLP, DecoderLayer, Llama.

Letters: B batch, T query length, S key length, D hidden_size, F intermediate_size,
N query heads, K key-value heads, H head_dim, V vocab_size.

Parameter paths are HF's names. Kernels are 2-D [in, out], so converting a checkpoint is
a transpose and one `LoRADense` serves all seven projections.

Source: transformers `models/llama/modeling_llama.py`.
"""

from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jlora.attention import attend
from jlora.config import LlamaConfig
from jlora.lora import LoRADense, matmul
from jlora.rope import apply_rope, rope_angles

# What a layer keeps for its backward pass under remat "minimal": every matmul's output,
# so that only norms, RoPE, SwiGLU and the attention scores are computed again.
SAVED_NAMES = ("q", "k", "v", "attention", "residual", "gate", "up")


def compute_dtype(wanted: str) -> Any:
    """Returns the dtype of activations; auto is bfloat16 on GPU and TPU, else float32."""
    if wanted == "auto":
        wanted = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(wanted)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far: per layer [B, S, K, H]; `length` of them."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, config: LlamaConfig, batch: int, size: int, dtype: Any) -> "KVCache":
        """Returns a cache with room for `size` tokens in each of `batch` rows."""
        shape = (batch, size, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        return cls(
            keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
            values=tuple(jnp.zeros(shape, dtype) for _ in layers),
            length=jnp.int32(0),
        )


@dataclass(frozen=True)
class _Call:
    """What every layer of one forward pass shares."""

    cos: Array
    sin: Array
    segment_ids: Array | None
    offset: Array | None


jax.tree_util.register_dataclass(_Call)


class Embed(nn.Module):
    """The table of token vectors [V, D]; the head too, where the two are tied."""

    config: LlamaConfig
    dtype: Any

    def setup(self) -> None:
        """Declares the table."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.embedding = self.param("embedding", nn.initializers.zeros_init(), shape)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns each token's vector; NaN for an id outside the table."""
        # Gathered whole over fsdp, as every weight is; looking up in a table that is cut
        # along D would make the partitioner replicate the result instead.
        table = nn.with_logical_constraint(self.embedding, ("vocab", "act_embed"))
        rows = table.at[tokens].get(
            mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
        )
        return rows.astype(self.dtype)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns hidden @ table^T: the head of a tied model."""
        return matmul(hidden, self.embedding.T, self.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, the mean in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns the normalised input in its own dtype."""
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(mean + self.eps)).astype(x.dtype)
        return normed * scale.astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: LlamaConfig
    dtype: Any
    implementation: str
    lora_dropout: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], call: _Call, past: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Returns the output and the keys and values to remember."""
        config = self.config
        batch, length, _ = x.shape

        def project(name: str, heads: int) -> Array:
            features = heads * config.head_dim
            y = LoRADense(
                features,
                use_bias=config.attention_bias,
                dropout=self.lora_dropout,
                dtype=self.dtype,
                name=name,
            )(x)
            y = y.reshape(batch, length, heads, config.head_dim)
            return nn.with_logical_constraint(
                y, ("batch", "length", "act_heads", None)
            )  # [B, T, N or K, H]

        q = apply_rope(
            project("q_proj", config.num_attention_heads), call.cos, call.sin
        )
        k = apply_rope(
            project("k_proj", config.num_key_value_heads), call.cos, call.sin
        )
        v = project("v_proj", config.num_key_value_heads)
        q, k, v = (checkpoint_name(x, n) for x, n in ((q, "q"), (k, "k"), (v, "v")))
        if past is not None:
            start = (0, 0 if call.offset is None else call.offset, 0, 0)
            k = jax.lax.dynamic_update_slice(past[0], k.astype(past[0].dtype), start)
            v = jax.lax.dynamic_update_slice(past[1], v.astype(past[1].dtype), start)
        out = attend(
            q,
            k,
            v,
            segment_ids=call.segment_ids,
            offset=call.offset,
            implementation=self.implementation,
        )
        out = checkpoint_name(out.reshape(batch, length, -1), "attention")
        out = LoRADense(
            config.hidden_size,
            use_bias=config.attention_bias,
            dropout=self.lora_dropout,
            dtype=self.dtype,
            name="o_proj",
        )(out)
        return out, (k, v)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    config: LlamaConfig
    dtype: Any
    lora_dropout: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the block's output."""

        def dense(name: str, features: int) -> LoRADense:
            return LoRADense(
                features,
                use_bias=self.config.mlp_bias,
                dropout=self.lora_dropout,
                dtype=self.dtype,
                name=name,
            )

        axes = ("batch", "length", "act_mlp")
        gate = dense("gate_proj", self.config.intermediate_size)(x)
        up = dense("up_proj", self.config.intermediate_size)(x)
        gate = checkpoint_name(nn.with_logical_constraint(gate, axes), "gate")
        up = checkpoint_name(nn.with_logical_constraint(up, axes), "up")
        return dense("down_proj", self.config.hidden_size)(jax.nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    config: LlamaConfig
    dtype: Any
    implementation: str
    lora_dropout: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], call: _Call, past: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Returns the residual stream and this layer's keys and values."""
        eps = self.config.rms_norm_eps
        attention = Attention(
            self.config,
            self.dtype,
            self.implementation,
            self.lora_dropout,
            name="self_attn",
        )
        mlp = MLP(self.config, self.dtype, self.lora_dropout, name="mlp")
        out, remembered = attention(RMSNorm(eps, name="input_layernorm")(x), call, past)
        x = checkpoint_name(x + out, "residual")
        x = x + mlp(RMSNorm(eps, name="post_attention_layernorm")(x))
        return nn.with_logical_constraint(
            x, ("batch", "length", "act_embed")
        ), remembered


class _Layers(nn.Module):
    """The decoder stack; its children are named "0", "1", ... as in HF."""

    config: LlamaConfig
    dtype: Any
    implementation: str
    remat: str
    lora_dropout: float

    @nn.compact
    def __call__(
        self, x: Array, call: _Call, cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        policies = jax.checkpoint_policies
        layer: Any = DecoderLayer
        if self.remat == "full":
            layer = nn.remat(DecoderLayer, policy=policies.nothing_saveable)
        elif self.remat == "minimal":
            policy = policies.save_only_these_names(*SAVED_NAMES)
            layer = nn.remat(DecoderLayer, policy=policy)
        remembered = []
        for i in range(self.config.num_hidden_layers):
            past = None if cache is None else (cache.keys[i], cache.values[i])
            x, kv = layer(
                self.config,
                self.dtype,
                self.implementation,
                self.lora_dropout,
                name=str(i),
            )(x, call, past)
            remembered.append(kv)
        if cache is None:
            return x, None
        keys, values = zip(*remembered, strict=True)
        return x, replace(cache, keys=keys, values=values)


class Llama(nn.Module):
    """The language model: tokens in, float32 logits out.

    Attributes:
        config: the architecture.
        dtype: of activations and matmuls.
        attention: implementation, see `jlora.attention`.
        remat: none, minimal or full; see `SAVED_NAMES`.
        lora_dropout: on the input of every lora_A, when a "dropout" rng is given.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    lora_dropout: float = 0.0

    def setup(self) -> None:
        """Declares the parameters under HF's names."""
        config = self.config
        self.embed_tokens = Embed(config, self.dtype)
        self.layers = _Layers(
            config, self.dtype, self.attention, self.remat, self.lora_dropout
        )
        self.norm = RMSNorm(config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = LoRADense(config.vocab_size, dtype=self.dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns the float32 logits of every next token."""
        hidden = self.hidden_states(
            tokens, segment_ids=segment_ids, positions=positions
        )
        return self._logits(hidden)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Returns the final normalised states, in `dtype`, that the head reads."""
        return self._run(tokens, positions, segment_ids, None)[0]

    def decode(
        self, tokens: Int[Array, "B T"], cache: KVCache, count: Int[Array, ""]
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Returns the logits after the first `count` tokens, and the cache with them.

        Tokens beyond `count` are padding: what they leave in the cache lies after its
        length, where no query sees it before it is overwritten.
        """
        positions = cache.length + jnp.arange(tokens.shape[1])[None, :]
        positions = jnp.broadcast_to(positions, tokens.shape)
        hidden, filled = self._run(tokens, positions, None, cache)
        assert filled is not None
        last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)
        return self._logits(last)[:, 0], replace(filled, length=cache.length + count)

    def _run(
        self,
        tokens: Array,
        positions: Array | None,
        segment_ids: Array | None,
        cache: KVCache | None,
    ) -> tuple[Array, KVCache | None]:
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        cos, sin = rope_angles(self.config, positions)
        call = _Call(cos, sin, segment_ids, None if cache is None else cache.length)
        x = self.embed_tokens(tokens)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        x, cache = self.layers(x, call, cache)
        return self.norm(x), cache

    def _logits(self, hidden: Array) -> Array:
        if self.config.tie_word_embeddings:
            logits = self.embed_tokens.logits(hidden)
        else:
            logits = self.lm_head(hidden)
        return logits.astype(jnp.float32)
