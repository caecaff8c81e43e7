"""Llama in flax.linen: RMSNorm, Attention, MLP, DecoderLayer, Llama.

Letters: B batch, T query length, S key length, D hidden_size, F intermediate_size,
N query heads, K key-value heads, H head_dim, V vocab_size.

Parameter paths are HF's names. Kernels are 2-D [in, out], so converting a checkpoint is
a transpose and one `LoRADense` serves all seven projections.

Source: transformers `models/llama/modeling_llama.py`. Above 300 lines, to be read top to
bottom: the whole forward pass is here.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jaxtyping import Array, Float, Int, UInt32

from jlora.config.llama_config import LlamaConfig
from jlora.errors import UsageError
from jlora.lora.lora_dense import (
    NORM_NAME,
    LoRADense,
    add_projection,
    head_logits,
    head_parameters,
    lookup,
    project,
    to_fuse,
)
from jlora.model.offload import run_offloaded
from jlora.model.rotary import apply_rope, rope_angles
from jlora.ops.attention import attend
from jlora.ops.compute_choices import Compute, default_platform
from jlora.ops.dropout import drop
from jlora.ops.elementwise import gated
from jlora.ops.hopper import fused_projections as fused

# What a layer's halves keep for their backward pass under remat "minimal", besides their
# inputs and outputs: every matmul's output, so that only norms, RoPE and SwiGLU are
# computed again.
SAVED_NAMES = ("residual", fused.PRODUCT_NAME, fused.DOWN_NAME, NORM_NAME)
# The projections of a layer, in the order in which dropout's seeds are drawn for them.
_PROJECTIONS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ["gate", "up", "down"]),
]


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
    """What every layer of one forward pass shares.

    Not typed as arrays, because JAX makes trees of this form that hold other things.
    """

    cos: Any
    sin: Any
    segment_ids: Any
    offset: Any


jax.tree_util.register_dataclass(_Call)


class Embed(nn.Module):
    """The table of token vectors [V, D]; the head too, where the two are tied."""

    config: LlamaConfig
    compute: Compute

    def setup(self) -> None:
        """Declares the table."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.embedding = self.param("embedding", nn.initializers.zeros_init(), shape)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns each token's vector, adapted; NaN for an id outside the table."""
        leaves = dict(self.variables["params"])
        # Gathered whole over fsdp, as every weight is; looking up in a table that is cut
        # along D would make the partitioner replicate the result instead.
        name = "trained_embedding" if "trained_embedding" in leaves else "embedding"
        leaves[name] = nn.with_logical_constraint(leaves[name], ("vocab", "act_embed"))
        return lookup(tokens, leaves, self.compute)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, the mean in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns the normalised input in its own dtype."""
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
        scale = self.variables["params"].get("trained_scale", scale)
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(mean + self.eps)).astype(x.dtype)
        return normed * scale.astype(x.dtype)


class Attention(nn.Module):
    """The projections around grouped-query attention, with rotary positions."""

    config: LlamaConfig
    compute: Compute
    lora_dropout: float | Array

    def setup(self) -> None:
        """Declares the projections."""
        config, bias = self.config, self.config.attention_bias
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        dense = partial(LoRADense, dropout=self.lora_dropout, compute=self.compute)
        self.q_proj = dense(queries * config.head_dim, use_bias=bias)
        self.k_proj = dense(keys * config.head_dim, use_bias=bias)
        self.v_proj = dense(keys * config.head_dim, use_bias=bias)
        self.o_proj = dense(config.hidden_size, use_bias=bias)

    def project(
        self, x: Float[Array, "B T D"], call: _Call
    ) -> tuple[
        Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]
    ]:
        """Returns queries and keys, turned by their positions, and values."""

        def heads(y: Array) -> Array:
            y = y.reshape(*y.shape[:2], -1, self.config.head_dim)
            return nn.with_logical_constraint(y, ("batch", "length", "act_heads", None))

        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (heads(y) for y in project(x, projections))
        return apply_rope(q, call.cos, call.sin), apply_rope(k, call.cos, call.sin), v

    def output(
        self, residual: Float[Array, "B T D"], out: Float[Array, "B T N H"]
    ) -> Float[Array, "B T D"]:
        """Returns the heads' outputs, mixed and added to the residual stream."""
        return add_projection(residual, out.reshape(*out.shape[:2], -1), self.o_proj)


class MLP(nn.Module):
    """SwiGLU: residual + down(silu(gate(x)) * up(x))."""

    config: LlamaConfig
    compute: Compute
    lora_dropout: float | Array

    def setup(self) -> None:
        """Declares the projections."""
        config, bias = self.config, self.config.mlp_bias
        dense = partial(LoRADense, dropout=self.lora_dropout, compute=self.compute)
        width = config.intermediate_size
        self.gate_proj = dense(width, use_bias=bias, keep=True)
        self.up_proj = dense(width, use_bias=bias, keep=True)
        self.down_proj = dense(config.hidden_size, use_bias=bias)

    def __call__(
        self, residual: Float[Array, "B T D"], x: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Returns the block's output, added to the residual stream."""
        found = to_fuse(x, (self.gate_proj, self.up_proj, self.down_proj))
        if found is not None and not any("lora_magnitude" in own for own in found[0]):
            return fused.swiglu(x, found[0], residual, found[1])
        gate, up = (
            nn.with_logical_constraint(y, ("batch", "length", "act_mlp"))
            for y in project(x, (self.gate_proj, self.up_proj))
        )
        return add_projection(
            residual, gated(gate, up, self.compute.platform), self.down_proj
        )


def _recomputed_attend(q: Array, k: Array, v: Array, *args: Any, **more: Any) -> Array:
    """Returns `attend(q, k, v, ...)`, whose scores the backward pass computes again."""
    return jax.checkpoint(lambda q, k, v: attend(q, k, v, *args, **more))(q, k, v)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and around a residual.

    Attention itself stands between the two halves that remat "minimal" recomputes, so
    that the flash kernel's residuals are kept and its forward pass never runs twice.
    """

    config: LlamaConfig
    compute: Compute
    lora_dropout: float | Array

    def setup(self) -> None:
        """Declares the parts under HF's names."""
        self.input_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.self_attn = Attention(self.config, self.compute, self.lora_dropout)
        self.post_attention_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.mlp = MLP(self.config, self.compute, self.lora_dropout)

    def before(self, x: Array, call: _Call) -> tuple[Array, Array, Array]:
        """Returns queries, keys and values."""
        return self.self_attn.project(self.input_layernorm(x), call)

    def after(self, x: Array, out: Array) -> Array:
        """Returns the residual stream past attention's output and the MLP."""
        x = checkpoint_name(self.self_attn.output(x, out), "residual")
        x = self.mlp(x, self.post_attention_layernorm(x))
        return nn.with_logical_constraint(x, ("batch", "length", "act_embed"))

    def __call__(
        self, x: Float[Array, "B T D"], call: _Call, past: tuple[Array, Array] | None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array]]:
        """Returns the residual stream and this layer's keys and values."""
        before: Any = DecoderLayer.before
        after: Any = DecoderLayer.after
        attention: Any = attend
        if self.compute.remat == "minimal":
            save = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
            before, after = (nn.remat(half, policy=save) for half in (before, after))
            if self.compute.attention == "xla":  # its residuals are [B, N, T, S]
                attention = _recomputed_attend
        q, k, v = before(self, x, call)
        if past is not None:
            start = (0, 0 if call.offset is None else call.offset, 0, 0)
            k = jax.lax.dynamic_update_slice(past[0], k.astype(past[0].dtype), start)
            v = jax.lax.dynamic_update_slice(past[1], v.astype(past[1].dtype), start)
        out = attention(
            q,
            k,
            v,
            self.compute,
            segment_ids=call.segment_ids,
            offset=call.offset,
        )
        return after(self, x, out), (k, v)


def _seeds(words: UInt32[Array, "projections 2"]) -> dict[str, Any]:
    """Returns the collection "dropout" of a layer: seeds for each of its projections."""
    found: dict[str, Any] = {}
    for path, seeds in zip(_PROJECTIONS, words, strict=True):
        block, name = path.split(".")
        found.setdefault(block, {})[name] = {"seeds": seeds}
    return found


class _Layers(nn.Module):
    """The decoder stack; its children are named "0", "1", ... as in HF."""

    config: LlamaConfig
    compute: Compute
    lora_dropout: float | Array

    @nn.compact
    def __call__(
        self, x: Array, call: _Call, cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        layer: Any = DecoderLayer
        if self.compute.remat == "full":
            layer = nn.remat(DecoderLayer)

        def run(leaves: Any, words: Any, x: Array, call: _Call, past: Any) -> Any:
            one = layer(self.config, self.compute, self.lora_dropout, parent=None)
            seeds = {} if words is None else {"dropout": _seeds(words)}
            return one.apply({"params": leaves, **seeds}, x, call, past)

        # One function for all layers, so that JAX traces and lowers it once; XLA puts it
        # into every place again. Outside of a trace it would be compiled at every call.
        run = jax.jit(run) if isinstance(x, Tracer) else run
        # What is to be captured has to be made in the modules' own places; dropout's keys
        # are others there.
        captures = self.is_mutable_collection("intermediates")
        own_scopes = captures or self.is_initializing()
        remembered = []
        layers = self.config.num_hidden_layers
        words: Any = [None] * layers
        if self.has_rng("dropout") and not own_scopes:
            # All at once: a key for each would be some hundred instructions each.
            words = jax.random.bits(
                self.make_rng("dropout"), (layers, len(_PROJECTIONS), 2), jnp.uint32
            )
        if self.compute.remat == "offload" and cache is None and not own_scopes:
            every = [self.variables["params"][str(i)] for i in range(layers)]

            def alone(leaves: Any, words: Any, x: Array, call: _Call) -> Array:
                return run(leaves, words, x, call, None)[0]

            return run_offloaded(alone, every, list(words), x, call), None
        for i in range(layers):
            past = None if cache is None else (cache.keys[i], cache.values[i])
            if own_scopes:
                own = layer(self.config, self.compute, self.lora_dropout, name=str(i))
                x, kv = own(x, call, past)
            else:
                leaves = self.variables["params"][str(i)]
                x, kv = run(leaves, words[i], x, call, past)
            remembered.append(kv)
        if cache is None:
            return x, None
        keys, values = zip(*remembered, strict=True)
        return x, replace(cache, keys=keys, values=values)


def _check_tokens(tokens: Any) -> None:
    shape = getattr(tokens, "shape", None)
    if shape is None or len(shape) != 2 or 0 in shape:
        found = type(tokens).__name__ if shape is None else f"shape {list(shape)}"
        raise UsageError(
            f"tokens: expected an array [B, T] of ids, B and T above 0, got {found}; "
            "make one by jnp.asarray([ids])"
        )


class Llama(nn.Module):
    """The language model: tokens in, float32 logits out.

    Attributes:
        config: the architecture.
        dtype: of activations and matmuls.
        attention: implementation, see `jlora.ops.attention`.
        remat: none, minimal, full or offload; see `SAVED_NAMES` and `jlora.model.offload`.
        lora_dropout: on the input of every lora_A, when a "dropout" rng is given.
        max_segments: most documents in a row; cudnn needs it for packed rows.
        kernels: of the projections, xla or hopper; see `jlora.ops.hopper.fused_projections`.
        platform: of the devices that will compute: cpu, gpu or tpu.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    lora_dropout: float | Array = 0.0
    max_segments: int = 0
    kernels: str = "xla"
    platform: str = field(default_factory=default_platform)

    @classmethod
    def with_compute(cls, config: LlamaConfig, compute: Compute) -> "Llama":
        """Returns the model that computes as `choose_compute` says."""
        return cls(config, **vars(compute))

    @property
    def compute(self) -> Compute:
        """How this model computes, as one value."""
        return Compute(
            platform=self.platform,
            dtype=self.dtype,
            attention=self.attention,
            kernels=self.kernels,
            remat=self.remat,
            max_segments=self.max_segments,
        )

    def setup(self) -> None:
        """Declares the parameters under HF's names."""
        config, compute = self.config, self.compute
        self.embed_tokens = Embed(config, compute)
        self.layers = _Layers(config, compute, self.lora_dropout)
        self.norm = RMSNorm(config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = LoRADense(config.vocab_size, compute=compute)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns the float32 logits of every next token.

        Raises:
            UsageError: the tokens are no array [B, T], or none.
        """
        _check_tokens(tokens)
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
        # Static, so rotary types that depend on the length are constants of the call: a
        # cache is made for the whole text, so its keys are all turned by one rule.
        length = tokens.shape[1] if cache is None else cache.keys[0].shape[1]
        cos, sin = rope_angles(self.config, positions, length, self.platform)
        call = _Call(cos, sin, segment_ids, None if cache is None else cache.length)
        x = self.embed_tokens(tokens)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        x, cache = self.layers(x, call, cache)
        return self.norm(x), cache

    def _logits(self, hidden: Array) -> Array:
        if self.is_initializing() and not self.config.tie_word_embeddings:
            self.lm_head(hidden)  # declares its parameters
        head = head_parameters(dict(self.variables["params"]))
        dropped = None
        if "lora_A" in head and self.has_rng("dropout"):
            dropped = drop(hidden, self.make_rng("dropout"), self.lora_dropout)
        logits = head_logits(hidden, head, self.compute, dropped=dropped)
        return logits.astype(jnp.float32)
