"""One decoder layer of Llama: RMSNorm, Attention and MLP, and what remat recomputes.

Letters: B batch, T query length, S key length, D hidden_size, F intermediate_size,
N query heads, K key-value heads, H head_dim, V vocab_size.

Parameter paths are HF's names. Kernels are 2-D [in, out], so one `LoRADense` serves all
seven projections, and converting a checkpoint is a transpose.

Source: transformers `models/llama/modeling_llama.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, UInt32

from jlora.config.llama_config import LlamaConfig
from jlora.lora.adapter_tree import Params
from jlora.lora.lora_dense import NORM_NAME, LoRADense
from jlora.lora.projections import add_projection, add_swiglu, project_all
from jlora.model.decoding.kv_cache import KeysValues, write_at
from jlora.model.remat.layer_memory import in_pieces, num_pieces
from jlora.model.remat.layer_stack import LayerParts
from jlora.model.rotary import apply_rope
from jlora.ops.attention import attend
from jlora.ops.attention_cached import attend_cached
from jlora.ops.compute_choices import Compute
from jlora.ops.elementwise import times_trained
from jlora.ops.hopper.fused_projections import DOWN_NAME, PRODUCT_NAME
from jlora.parallel.context import heads_of_rows, tokens_of_heads
from jlora.parallel.own_program import into_split

# What remat "minimal" saves for the backward pass, besides the inputs and outputs of a
# layer's two halves: the stream between attention and MLP, the products of gate and up
# (with DoRA of all projections), x A in the fused kernels, and DoRA's norms. So norms,
# rotary embedding, SwiGLU and, outside the kernels, x A are recomputed, but no product with
# W, except for gate's and up's second one under DoRA with dropout.
SAVED_NAMES = ("residual", PRODUCT_NAME, DOWN_NAME, NORM_NAME)
# The projections of a layer, in the order in which the seeds of their dropout are drawn.
PROJECTIONS = [
    *(("self_attn", f"{name}_proj") for name in "qkvo"),
    *(("mlp", f"{name}_proj") for name in ["gate", "up", "down"]),
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedInputs:
    """Inputs of a forward pass that are the same for every layer.

    Not typed as arrays, because JAX makes trees of this form that hold other things.
    """

    cos: Any
    """Of the rotary angles [B, T, 1, H / 2]."""
    sin: Any
    segment_ids: Any
    """[B, T] of whole rows, or None where a row is one document."""
    offset: Any
    """[B], tokens before this call in the cache; None without a cache."""


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
        leaves = self.variables["params"]
        if "trained_scale" in leaves:
            return times_trained(normed, leaves["trained_scale"])
        return normed * scale.astype(x.dtype)


class Attention(nn.Module):
    """The projections before and after grouped-query attention."""

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
        self.o_proj = dense(config.hidden_size, use_bias=bias, takes_split=True)

    def queries_keys_values(
        self, x: Float[Array, "B T D"], shared: SharedInputs
    ) -> tuple[
        Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]
    ]:
        """Returns queries and keys with their rotary embedding, and values."""

        def heads(y: Array) -> Array:
            y = y.reshape(*y.shape[:2], -1, self.config.head_dim)
            return nn.with_logical_constraint(y, ("batch", "length", "act_heads", None))

        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = map(heads, project_all(into_split(x), layers))
        cos, sin = shared.cos, shared.sin
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def add_output(
        self, residual: Float[Array, "B T D"], out: Array
    ) -> Float[Array, "B T D"]:
        """Returns residual + o_proj(what `DecoderLayer.attend` returns)."""
        out = tokens_of_heads(out)
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
        self.gate_proj = dense(width, use_bias=bias, save_output=True)
        self.up_proj = dense(width, use_bias=bias, save_output=True)
        self.down_proj = dense(config.hidden_size, use_bias=bias, takes_split=True)

    def __call__(
        self, residual: Float[Array, "B T D"], x: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Returns the residual stream after the MLP."""
        return add_swiglu(residual, x, self.gate_proj, self.up_proj, self.down_proj)


class DecoderLayer(nn.Module):
    """Attention and MLP, each after a norm and added to the residual stream."""

    config: LlamaConfig
    compute: Compute
    lora_dropout: float | Array

    def setup(self) -> None:
        """Declares the parts under HF's names."""
        settings = self.config, self.compute, self.lora_dropout
        self.input_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.self_attn = Attention(*settings)
        self.post_attention_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.mlp = MLP(*settings)

    def before_attention(
        self, x: Array, shared: SharedInputs
    ) -> tuple[Array, Array, Array]:
        """Returns queries, keys and values."""
        return self.self_attn.queries_keys_values(self.input_layernorm(x), shared)

    def after_attention(self, x: Array, out: Array) -> Array:
        """Returns the residual stream after attention's output and the MLP."""
        x = checkpoint_name(self.self_attn.add_output(x, out), "residual")
        count = self._num_pieces(x)
        if count == 1:
            x = self.add_mlp(x)
        else:
            names = ("post_attention_layernorm", "mlp")
            leaves = {name: self.variables["params"][name] for name in names}
            x = in_pieces(self._pure_add_mlp(), leaves, x, count, self.compute)
        return nn.with_logical_constraint(x, ("batch", "length", "act_embed"))

    def add_mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the residual stream after the MLP."""
        return self.mlp(x, self.post_attention_layernorm(x))

    def _num_pieces(self, x: Float[Array, "B T D"]) -> int:
        """Returns into how many parts of the positions the MLP is cut.

        More than one where memory comes first: the base is quantised and the layer is computed
        again. Dropout needs all at once, because its mask follows from an element's place,
        and DoRA the stored weights.
        """
        layers = self.mlp.gate_proj, self.mlp.up_proj, self.mlp.down_proj
        if (
            self.compute.remat not in ("full", "offload")
            or self.is_initializing()
            or layers[0].has_dropout()
            or not all(layer.has_variable("params", "kernel_q") for layer in layers)
            or any(layer.has_variable("params", "lora_magnitude") for layer in layers)
        ):
            return 1
        rows, length, _ = x.shape
        width = self.config.intermediate_size
        return num_pieces(rows // self.compute.row_shards, length, width)

    @nn.nowrap
    def _pure_add_mlp(self) -> Callable[[Params, Array], Array]:
        """Returns `add_mlp` as a function of the parameters that JAX can transform."""
        layer = self.clone(parent=None)

        def add_mlp(leaves: Params, x: Array) -> Any:
            return layer.apply({"params": leaves}, x, method="add_mlp")

        return add_mlp

    def __call__(
        self, x: Float[Array, "B T D"], shared: SharedInputs, cached: KeysValues | None
    ) -> tuple[Float[Array, "B T D"], KeysValues]:
        """Returns the residual stream and this layer's keys and values."""
        q, k, v = self.before_attention(x, shared)
        k, v = written(cached, (k, v), shared)
        return self.after_attention(x, self.attend(q, k, v, shared)), (k, v)

    @nn.nowrap
    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Array,
        v: Array,
        shared: SharedInputs,
    ) -> Float[Array, "B _ _ H"]:
        """Returns the outputs of all heads, over the keys of a cache if there is one.

        Where a context axis splits rows, those of the device's heads of whole rows.
        """
        if shared.offset is not None:
            return attend_cached(q, k, v, shared.offset)
        q, k, v = map(heads_of_rows, (q, k, v))
        return attend(q, k, v, self.compute, segment_ids=shared.segment_ids)

    @nn.nowrap
    def parts(self) -> LayerParts:
        """Returns the layer as functions of its parameters; all but full and offload remat.

        Remat "minimal" recomputes the parts before and after attention separately. What lies
        between them, the flash kernel, keeps its own residuals and never runs twice.
        """

        def before(leaves: Params, seeds: Any, x: Array, shared: SharedInputs) -> Any:
            return self.apply(
                _variables(leaves, seeds), x, shared, method="before_attention"
            )

        def after(leaves: Params, seeds: Any, x: Array, out: Array) -> Any:
            return self.apply(
                _variables(leaves, seeds), x, out, method="after_attention"
            )

        attention: Any = self.attend
        if self.compute.remat == "minimal":
            save = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
            before, after = (
                jax.checkpoint(half, policy=save) for half in (before, after)
            )
            if self.compute.attention == "xla":  # its residuals are [B, N, T, S]
                attention = jax.checkpoint(attention)
        return LayerParts(before, attention, after)


def written(
    cached: KeysValues | None, new: KeysValues, shared: SharedInputs
) -> KeysValues:
    """Returns the keys and values that queries see: new ones, in a cache if there is one."""
    return new if cached is None else write_at(cached, new, shared.offset)


def _variables(
    leaves: Params, seeds: UInt32[Array, "projections 2"] | None
) -> dict[str, Any]:
    """Returns a layer's parameters, and its dropout seeds as {block: {projection: seeds}}."""
    found: dict[str, Any] = {"params": leaves}
    if seeds is not None:
        found["dropout"] = {}
        for (block, name), own in zip(PROJECTIONS, seeds, strict=True):
            found["dropout"].setdefault(block, {})[name] = {"seeds": own}
    return found
