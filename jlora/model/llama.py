"""Llama: token embedding, decoder layers, final norm and logits.

The letters in shapes are those of `jlora.model.decoder_layer`.
"""

from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jlora.config.llama_config import LlamaConfig
from jlora.errors import UsageError
from jlora.lora.embedding_and_head import embed, head_logits, head_parameters
from jlora.lora.lora_dense import LoRADense
from jlora.model.decoder_layer import (
    PROJECTIONS,
    DecoderLayer,
    RMSNorm,
    SharedInputs,
    written,
)
from jlora.model.decoding.kv_cache import KeysValues, KVCache, write_at
from jlora.model.remat.layer_memory import gradients_together
from jlora.model.remat.layer_runs import is_stacked
from jlora.model.remat.layer_stack import LayerParts, run_loops, run_stack
from jlora.model.rotary import rope_angles
from jlora.ops.compute_choices import Compute, default_platform
from jlora.ops.dropout import drop
from jlora.parallel.context import whole_length, whole_rows
from jlora.parallel.own_program import holds_parts


class Llama(nn.Module):
    """The language model: tokens in, float32 logits out.

    Attributes:
        config: the architecture.
        dtype: of activations and matrix products.
        attention: xla, cudnn or splash; see `jlora.ops.attention`.
        remat: none, minimal, full or offload: what the backward pass recomputes; see
            `jlora.model.decoder_layer.SAVED_NAMES` and `jlora.model.remat.layer_stack`.
        lora_dropout: rate on the input of every lora_A, when a "dropout" rng is given.
        max_segments: most documents in a row; cudnn needs it for packed rows.
        kernels: of the projections, xla or hopper; see `jlora.lora.projections`.
        code_products: see `jlora.ops.compute_choices.Compute`.
        platform: of the devices that compute: cpu, gpu or tpu.
        row_shards: shards of the batch axis that it sees; set by the step.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    lora_dropout: float | Array = 0.0
    max_segments: int = 0
    kernels: str = "xla"
    code_products: tuple[str, ...] = ()
    platform: str = field(default_factory=default_platform)
    row_shards: int = 1

    @classmethod
    def with_compute(cls, config: LlamaConfig, compute: Compute) -> "Llama":
        """Returns the model that computes as `choose_compute` decided."""
        return cls(config, **vars(compute))

    @property
    def compute(self) -> Compute:
        """How this model computes, as one value."""
        return Compute(
            platform=self.platform,
            dtype=self.dtype,
            attention=self.attention,
            kernels=self.kernels,
            code_products=self.code_products,
            remat=self.remat,
            max_segments=self.max_segments,
            row_shards=self.row_shards,
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
            UsageError: tokens are not an array [B, T], or an empty one.
            UnsupportedError: rows are longer than the model's attention window.
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
        """Returns the final normalised states, in `dtype`, from which logits are made."""
        return self._run(tokens, positions, segment_ids, None)[0]

    def decode(
        self,
        tokens: Int[Array, "B T"],
        cache: KVCache,
        count: Int[Array, " B"],
        *,
        is_prompt: bool = False,
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Returns the logits after each row's first `count` tokens, and the cache with them.

        Tokens beyond `count` are padding. Their keys and values are in the cache after its
        length, where no query sees them before they are overwritten.

        Args:
            tokens: that follow those in the cache.
            cache: of the tokens so far.
            count: tokens of each row.
            is_prompt: whether the cache is empty, so that the tokens attend to each other
                as in training.
        """
        positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
        seen = None if is_prompt else cache
        hidden, filled = self._run(tokens, positions, None, seen, length=cache.size)
        if is_prompt:
            old = zip(cache.keys, cache.values, strict=True)
            filled = [
                write_at(own, new, cache.length)
                for own, new in zip(old, filled, strict=True)
            ]
        last = jnp.take_along_axis(hidden, (count - 1)[:, None, None], axis=1)
        keys, values = zip(*filled, strict=True)
        return self._logits(last)[:, 0], KVCache(keys, values, cache.length + count)

    def _run(
        self,
        tokens: Array,
        positions: Array | None,
        segment_ids: Array | None,
        cache: KVCache | None,
        length: int | None = None,
    ) -> tuple[Array, list[KeysValues]]:
        """Returns the final states, and keys and values of every layer; see `_Layers`.

        Some rotary types depend on the `length` of the text. A cache has room for all of it,
        so by its size all keys get the same angles.
        """
        if cache is None:
            self.config.check_window(whole_length(tokens), "tokens in a row")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        length = whole_length(tokens) if length is None else length
        cos, sin = rope_angles(self.config, positions, length, self.platform)
        offset = None if cache is None else cache.length
        x = self.embed_tokens(tokens)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        shared = SharedInputs(cos, sin, whole_rows(segment_ids), offset)
        x, filled = self.layers(x, shared, cache)
        return self.norm(x), filled

    def _logits(self, hidden: Array) -> Array:
        if self.is_initializing() and not self.config.tie_word_embeddings:
            self.lm_head(hidden)  # declares its parameters
        head = head_parameters(dict(self.variables["params"]))
        dropped = None
        if "lora_A" in head and self.has_rng("dropout"):
            dropped = drop(hidden, self.make_rng("dropout"), self.lora_dropout)
        logits = head_logits(hidden, head, self.compute, dropped=dropped)
        return logits.astype(jnp.float32)


class Embed(nn.Module):
    """The token embedding [V, D]; a tied head reads the same leaf (`head_parameters`)."""

    config: LlamaConfig
    compute: Compute

    def setup(self) -> None:
        """Declares the embedding."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.embedding = self.param("embedding", nn.initializers.zeros_init(), shape)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns each token's vector with the adapter applied; NaN for an unknown id."""
        leaves = dict(self.variables["params"])
        # Gathers an embedding that is sharded along D over fsdp, as every weight is gathered
        # before use. Without this, XLA would replicate the vectors of the whole batch.
        name = "trained_embedding" if "trained_embedding" in leaves else "embedding"
        leaves[name] = nn.with_logical_constraint(leaves[name], ("vocab", "act_embed"))
        return embed(tokens, leaves, self.compute)


class _Layers(nn.Module):
    """The decoder layers; their parameters are named "0", "1", ... as in HF."""

    config: LlamaConfig
    compute: Compute
    lora_dropout: float | Array

    @nn.compact
    def __call__(
        self, x: Array, shared: SharedInputs, cache: KVCache | None
    ) -> tuple[Array, list[KeysValues]]:
        """Returns the residual stream, and the keys and values of every layer.

        Under remat "offload", or on a mesh that splits the weights, keys and values are
        returned only if there is a cache.
        """
        cached: list[KeysValues | None] = [None] * self.config.num_hidden_layers
        if cache is not None:
            cached = list(zip(cache.keys, cache.values, strict=True))
        filled: list[KeysValues] = []
        # Flax can initialise parameters and capture intermediate values only of submodules,
        # not in the functions below. Their dropout masks are other ones than the functions'.
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            for i, old in enumerate(cached):
                x, new = self._make_layer(name=str(i))(x, shared, old)
                filled.append(new)
            return x, filled
        # All layers call the same jitted functions, so JAX traces and lowers one layer only;
        # XLA inlines the calls. Where x is no tracer they are not jitted, because a call of
        # the model makes new functions, which would be compiled again each time.
        jit: Any = jax.jit if isinstance(x, Tracer) else lambda function: function
        parts, seeds = self._make_layer(parent=None).parts(), self._dropout_seeds()
        params, remat = dict(self.variables["params"]), self.compute.remat
        if is_stacked(params):
            parts = LayerParts(*map(jit, parts))
            return run_loops(parts, params, seeds, x, shared, remat=remat), filled
        leaves = [params[str(i)] for i in range(len(cached))]
        if cache is None and (remat == "offload" or holds_parts()):
            parts = LayerParts(*map(jit, parts))
            return run_stack(parts, leaves, seeds, x, shared, remat=remat), filled

        def run(leaves: Any, seeds: Any, x: Any, shared: Any, cached: Any) -> Any:
            q, k, v = parts.before(leaves, seeds, x, shared)
            k, v = written(cached, (k, v), shared)
            out = parts.attention(q, k, v, shared)
            return parts.after(leaves, seeds, x, out), (k, v)

        run = jit(jax.checkpoint(run) if remat == "full" else run)
        for own, own_seeds, old in zip(leaves, seeds, cached, strict=True):
            own, x = gradients_together(own, x)
            x, new = run(own, own_seeds, x, shared, old)
            filled.append(new)
        return x, filled

    @nn.nowrap
    def _make_layer(self, **place: Any) -> DecoderLayer:
        return DecoderLayer(self.config, self.compute, self.lora_dropout, **place)

    def _dropout_seeds(self) -> list[Any]:
        """Returns every layer's dropout seeds [7, 2], or None for each without dropout."""
        layers = self.config.num_hidden_layers
        if not self.has_rng("dropout"):
            return [None] * layers
        # All at once: making a key for each would be some hundred instructions each.
        shape = (layers, len(PROJECTIONS), 2)
        return list(jax.random.bits(self.make_rng("dropout"), shape, jnp.uint32))


def _check_tokens(tokens: Any) -> None:
    shape = getattr(tokens, "shape", None)
    if shape is None or len(shape) != 2 or 0 in shape:
        found = type(tokens).__name__ if shape is None else f"shape {list(shape)}"
        raise UsageError(
            f"tokens: expected an array [B, T] of ids, B and T above 0, got {found}; "
            "make one by jnp.asarray([ids])"
        )
