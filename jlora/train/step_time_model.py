"""How long a step should take: products, attention, passes over arrays, and the wire.

A step takes the sum of the times of

- products with weights and adapters, at a share of the device's peak for their format;
- attention, at a share of its bfloat16 peak;
- passes that only move bytes, at a share of its memory's bandwidth;
- what of the collectives no computation hides, at a share of the link's bandwidth.

The four shares were measured on H200s (docs/performance.md compares); for other devices
they are an expectation. Left out are the host, dropout, DoRA, and padding or segments: each
row counts as one document of its whole length.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jlora.lora.adapter_tree import (
    EMBEDDING,
    HEAD,
    Params,
    modules,
    split,
    trainable_mask,
)
from jlora.ops.quantize import is_quantized, kernel_shape, stored_format
from jlora.ops.quantized_matmul import multiplies_codes
from jlora.parallel.described_devices import NETWORK, DeviceKind, kind_of
from jlora.train.memory_estimate import Workload

PRODUCTS, ATTENTION, BANDWIDTH, LINK = 0.70, 0.50, 0.55, 0.78


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step's parts, and what each device receives over the wire."""

    products: float
    attention: float
    passes: float
    exposed: float
    """Of collectives that nothing hides."""
    wire_bytes: float

    @property
    def computing(self) -> float:
        """Seconds of a step without collectives."""
        return self.products + self.attention + self.passes

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.computing + self.exposed


def step_time(
    params: Params, work: Workload, mesh: Mesh, *, parts: int = 1
) -> StepTime | None:
    """Returns the expected time of a step, or None where the model does not apply.

    It applies to bfloat16 activations on devices of `described_devices.KINDS`, with one adapter.

    Args:
        params: the base with an adapter; shapes are enough.
        work: of one device, for a part of the batch.
        mesh: devices.
        parts: that a batch is computed in.
    """
    kind = kind_of(mesh.devices.flat[0])
    if kind is None or work.compute.dtype != jnp.bfloat16 or work.adapters > 1:
        return None
    tokens = work.rows * work.length
    linear = {n: x for n, x in modules(params).items() if ".layers." in n and _is_2d(x)}
    products = _head_seconds(params, work, kind)
    moved = 2 * tokens * _layer_passes(work)
    for name, leaves in linear.items():
        products += tokens * _product_seconds(name, leaves, work, kind)
        moved += _module_bytes(name, leaves, work, tokens)
    attention = _attention_seconds(work, kind, tokens)
    passes = moved / (BANDWIDTH * kind.bandwidth)
    once = StepTime(products, attention, passes, 0, 0)
    wire = _wire(params, work, mesh, parts)
    exposed = wire.exposed_seconds(once, work, mesh, kind)
    return StepTime(
        parts * products, parts * attention, parts * passes, exposed, wire.received
    )


def _is_2d(leaves: Params) -> bool:
    return "kernel" in leaves or is_quantized(leaves)


def _recomputes(work: Workload) -> bool:
    return work.compute.remat in ("full", "offload")


def _rate(kind: DeviceKind, name: str) -> float:
    return PRODUCTS * kind.products[name]


def _product_seconds(
    name: str, leaves: Params, work: Workload, kind: DeviceKind
) -> float:
    """Returns the time of a projection's products for one token.

    A weight is multiplied forward and for the gradient of its input, and once more where
    layers are recomputed. But down_proj's output is not needed for a gradient.
    """
    again = _recomputes(work) and not name.endswith("down_proj")
    stored = (
        stored_format({"x": leaves}) if multiplies_codes(leaves, work.compute) else None
    )
    weights = kernel_shape(leaves)[0] * kernel_shape(leaves)[1]
    factors = sum(leaves[k].size for k in ("lora_A", "lora_B") if k in leaves)
    flops = weights * (6 if again else 4) / _rate(kind, stored or "bf16")
    return (flops + 6 * factors / _rate(kind, "bf16")) / work.tensor


def _head_seconds(params: Params, work: Workload, kind: DeviceKind) -> float:
    """Returns the time of the head's products, and of two passes over the logits."""
    weights = work.config.vocab_size * work.config.hidden_size
    tokens = work.rows * work.length / work.tensor
    logits = 2 * 2 * tokens * work.config.vocab_size
    return 4 * weights * tokens / _rate(kind, "bf16") + logits / (
        BANDWIDTH * kind.bandwidth
    )


def _layer_passes(work: Workload) -> float:
    """Returns how many numbers of all layers are read or written for one token.

    Norms and rotary embedding, forward and backward, and the backward pass of SwiGLU. XLA's
    kernels make SwiGLU in a pass of its own, too, and attention without a kernel writes
    its float32 scores and weights, and their gradients.
    """
    c = work.config
    keys, queries = (
        c.num_key_value_heads * c.head_dim,
        c.num_attention_heads * c.head_dim,
    )
    numbers = 12 * c.hidden_size + 4 * (queries + keys)
    numbers *= 4 / 3 if _recomputes(work) else 1
    numbers += 6 * c.intermediate_size
    if work.compute.kernels == "xla":
        numbers += 3 * c.intermediate_size * (2 if _recomputes(work) else 1)
    if work.compute.attention == "xla":
        numbers += 16 * c.num_attention_heads * work.length * work.context
    return c.num_hidden_layers * numbers


def _module_bytes(name: str, leaves: Params, work: Workload, tokens: int) -> float:
    """Returns the bytes that a projection's adapter, and its stored form, have moved.

    An adapter reads its input forward and backward, and the gradient of its output twice.
    Outside the fused kernels its product is added in a pass, and so is its gradient. Codes
    are made from inputs and gradients; other stored weights are dequantised in each pass.
    """
    rows, columns = kernel_shape(leaves)
    if name.endswith(("o_proj", "down_proj")):
        rows //= work.tensor
    else:
        columns //= work.tensor
    wide = 2 * tokens * (rows + columns)
    moved = 0.0
    if "lora_A" in leaves:
        moved += 2 * wide if work.compute.kernels == "hopper" else 4 * wide
    if multiplies_codes(leaves, work.compute):
        moved += 1.5 * wide
    elif is_quantized(leaves):
        stored = _frozen_bytes(leaves) / work.tensor
        again = 3 if _recomputes(work) else 2
        moved += again * (stored + 2 * rows * columns)
    return moved


def _attention_seconds(work: Workload, kind: DeviceKind, tokens: int) -> float:
    """Returns the time of causal attention: two products forward, five backward."""
    c = work.config
    width = c.num_attention_heads * c.head_dim
    seen = work.length * work.context
    flops = (9 if _recomputes(work) else 7) * width * seen * tokens
    return c.num_hidden_layers * flops / (ATTENTION * kind.products["bf16"])


@dataclass(frozen=True)
class _Wire:
    """Bytes that a device receives in a step."""

    layer: float
    """Of the weights of a layer, once."""
    gathers: int
    """Of a layer's weights."""
    layers: int
    embedding: float
    head: float
    adapter: float
    gradients: float
    sums: float
    """Of activations, where a tensor axis splits the layers."""
    exchanged: float
    """Of tokens for heads, where a context axis splits the rows."""
    is_quantized: bool

    @property
    def received(self) -> float:
        """Bytes of all collectives."""
        ends = self.embedding + self.head + self.adapter + self.gradients
        return (
            ends + self.sums + self.exchanged + self.gathers * self.layers * self.layer
        )

    def exposed_seconds(
        self, once: StepTime, work: Workload, mesh: Mesh, kind: DeviceKind
    ) -> float:
        """Returns the time of the collectives that no computation hides.

        The embedding, the adapters, and the layers with which a pass begins are needed at
        once. The other layers' weights are gathered beside the attention of the layer before;
        unquantised ones beside all of it in the forward pass. The head's are gathered beside
        the last layer. Gradients, sums and exchanged activations come when all is computed.
        """
        split = _link(mesh, "fsdp", kind)
        beside = once.attention / self.layers
        forward = 2 / 9 * beside if _recomputes(work) else 2 / 7 * beside
        backward = beside - forward
        if not self.is_quantized:
            forward = once.computing / (4 if _recomputes(work) else 3) / self.layers
        gather = self.layer / split
        late = sum(max(0.0, gather - hidden) for hidden in (forward, backward))
        passes = self.gathers / 2
        return (
            (self.embedding + self.adapter) / split
            + passes * (2 * gather + (self.layers - 1) * late)
            + self.gradients / _link(mesh, "data", kind)
            + self.sums / _link(mesh, "tensor", kind)
            + self.exchanged / _link(mesh, "context", kind)
        )


def _wire(params: Params, work: Workload, mesh: Mesh, parts: int) -> _Wire:
    """Returns what each device receives; layers are gathered as they are stored."""
    fsdp, tensor = work.fsdp, work.tensor
    shards = mesh.shape["data"] * fsdp * work.context
    found = modules(params)
    head, embedding = found.get(HEAD, {}), found[EMBEDDING]
    layers = list(params["layers"].values())
    trainable = jax.tree.leaves(split(params, trainable_mask(params))[0])
    adapter = sum(leaf.size * leaf.dtype.itemsize for leaf in trainable)
    tokens = work.rows * work.length
    activation = 2 * tokens * work.config.hidden_size
    sums = len(layers) * (5 if _recomputes(work) else 4) * parts
    others = 1 - 1 / fsdp
    ends = 1 - 1 / (fsdp * tensor)
    return _Wire(
        layer=max(map(_frozen_bytes, layers)) / tensor * others,
        gathers=2 * parts,
        layers=len(layers),
        embedding=_frozen_bytes(embedding) * ends,
        head=_frozen_bytes(head) * ends,
        adapter=adapter * others,
        gradients=2 * adapter * (1 - 1 / shards),
        sums=2 * sums * activation * (1 - 1 / tensor),
        exchanged=len(layers) * parts * _exchanged_bytes(work),
        is_quantized=stored_format(params) is not None,
    )


def _exchanged_bytes(work: Workload) -> float:
    """Returns what a device receives for a layer: queries, keys, values and outputs.

    Forward, backward, and again where they are recomputed: all, or outputs only.
    """
    c = work.config
    copied = math.lcm(c.num_key_value_heads, work.context)
    all_heads = 2 * (c.num_attention_heads + copied)
    again = {"none": 0, "minimal": c.num_attention_heads}
    heads = 2 * all_heads + again.get(work.compute.remat, all_heads)
    tokens = work.rows * work.length
    return 2 * tokens * heads * c.head_dim * (1 - 1 / work.context)


def _link(mesh: Mesh, axis: str, kind: DeviceKind) -> float:
    """Returns the bytes per second at which the devices of an axis exchange.

    The axes that come after it lie within it, so the last ones stay within a host.
    """
    sizes = list(mesh.shape.values())
    span = math.prod(sizes[list(mesh.shape).index(axis) :])
    return LINK * (kind.link if span <= kind.linked else NETWORK)


def _frozen_bytes(tree: Params) -> int:
    leaves = jax.tree.leaves(split(tree, trainable_mask(tree))[1])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
