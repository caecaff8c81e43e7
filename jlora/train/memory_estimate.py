"""What a step needs in memory, estimated before step 1, and the remat that follows."""

import math
import os
import resource
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jlora.config.llama_config import LlamaConfig
from jlora.config.run_config import ComputeConfig
from jlora.errors import UsageError
from jlora.lora.adapter_tree import (
    EMBEDDING,
    HEAD,
    Params,
    is_adapter,
    is_trainable,
    modules,
    split,
    trainable_mask,
)
from jlora.lora.projections import can_fuse_any, can_fuse_tokens, suitable_length
from jlora.model.remat.layer_memory import num_pieces
from jlora.ops.compute_choices import Compute, choose_compute
from jlora.ops.quantize import is_quantized, kernel_shape
from jlora.ops.quantized_matmul import multiplies_codes
from jlora.parallel.own_program import own_config, runs_own_program
from jlora.parallel.sharding import check_length
from jlora.train.adam_8bit import moment_bytes
from jlora.train.device_model import LOOPING_PLATFORMS
from jlora.train.optimizer import stack_layers

# Room left for the compiler's temporary buffers and fragmentation.
USABLE_SHARE = 0.9


@dataclass(frozen=True)
class Workload:
    """What one device computes at a time, with every `auto` decided."""

    config: LlamaConfig
    rows: int
    """Rows of a part of the batch."""
    length: int
    """Tokens of each row."""
    context: int
    """Devices that have as many of the same row."""
    fsdp: int
    """Devices that split the weights, and gather those of a layer before it computes."""
    tensor: int
    """Devices that split the layers."""
    devices: int
    """Devices of this process."""
    compute: Compute
    adapters: int = 1
    """Adapters that are trained at once, each with its own rows."""
    optimizer: str = "adamw"
    """Its rule, see `OptimConfig`."""
    hint: str = ""
    """What would be faster, for the user; empty if nothing is known."""


def plan_workload(
    config: LlamaConfig,
    params: Params,
    mesh: Mesh,
    *,
    compute: ComputeConfig,
    rows: int,
    length: int,
    max_segments: int = 0,
    adapters: int = 1,
    optimizer: str = "adamw",
) -> Workload:
    """Returns the workload of one device, and with it the choice of remat.

    remat auto becomes the least recomputation that is estimated to fit, or offload if none
    does. On a CPU it is none, because no remat saves memory there.

    Args:
        config: the architecture.
        params: the base with an adapter; shapes are enough.
        mesh: devices.
        compute: what the user asked for.
        rows: computed at a time on all devices, of each adapter.
        length: tokens per row.
        max_segments: most documents in a row.
        adapters: trained at once.
        optimizer: its rule.

    Raises:
        UsageError: an attention implementation or kernels that cannot run here, or the mesh
            does not divide the tokens of a row.
    """
    check_length(mesh, length)
    chosen = choose_compute(
        compute, mesh, head_dim=config.head_dim, max_segments=max_segments
    )
    if chosen.kernels == "hopper" and not can_fuse_any(params, chosen.dtype):
        if compute.kernels == "hopper":
            raise UsageError(
                "compute.kernels=hopper: no weight of this run is one that the fused "
                "kernels take (float32, with biases, or sizes that do not "
                "divide); use auto or xla"
            )
        chosen = replace(chosen, kernels="xla")
    is_own = runs_own_program(mesh, params["layers"])
    if chosen.kernels == "hopper" and not is_own:
        if compute.kernels == "hopper":
            raise UsageError(
                f"compute.kernels=hopper: mesh.tensor={mesh.shape['tensor']} splits layers "
                "that have biases or DoRA, which only XLA does; use mesh.data or "
                "mesh.fsdp, or kernels auto or xla"
            )
        chosen = replace(chosen, kernels="xla")
    own_rows = adapters * rows // (mesh.shape["data"] * mesh.shape["fsdp"])
    context, hint = mesh.shape["context"], ""
    own_length = length // context
    if chosen.kernels == "hopper" and not can_fuse_tokens(own_rows * own_length):
        better = suitable_length(own_rows, own_length) * context
        hint = (
            f"the fused ones do not take the {own_rows} x {own_length} tokens of a device; "
            f"data.packing with data.seq_len {better} would be faster"
        )
        if compute.kernels == "hopper":
            raise UsageError(f"compute.kernels=hopper: {hint}")
        chosen = replace(chosen, kernels="xla")
    work = Workload(
        config=own_config(config, mesh.shape["tensor"]) if is_own else config,
        rows=own_rows,
        length=own_length,
        context=context,
        fsdp=mesh.shape["fsdp"],
        tensor=mesh.shape["tensor"],
        devices=mesh.size // jax.process_count(),
        compute=replace(chosen, remat=compute.remat),
        adapters=adapters,
        optimizer=optimizer,
        hint=hint,
    )
    if compute.remat != "auto":
        return work
    if chosen.platform == "cpu":
        return replace(work, compute=replace(chosen, remat="none"))
    for remat in ("none", "minimal", "full"):
        tried = replace(work, compute=replace(chosen, remat=remat))
        if sum(memory_bytes(params, tried).values()) <= (
            USABLE_SHARE * device_memory_bytes(mesh)
        ):
            return tried
    return replace(work, compute=replace(chosen, remat="offload"))


def memory_bytes(params: Params, work: Workload) -> dict[str, int]:
    """Returns the estimated bytes per GPU or TPU of each part of a training step."""
    weights = adapter = trained = 0
    trainable, _ = split(params, trainable_mask(params))
    moments = moments_bytes(trainable, work)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if is_adapter(path[-1].key):
            adapter += size * work.adapters
        else:
            weights += size
        trained += size if is_trainable(path[-1].key) else 0
    # Either the logits exist or a layer's temporary arrays.
    size = jnp.dtype(work.compute.dtype).itemsize
    logits = 2 * size * work.compute.loss_chunk_tokens * work.config.vocab_size
    dequantised = _dequantised_bytes(params, work) // work.tensor
    layer = _layer_bytes(work, is_quantized=dequantised > 0) + dequantised
    if work.fsdp * work.tensor > 1:
        gathered = max(map(_frozen_bytes, params["layers"].values())) // work.tensor
        found = modules(params)
        head = found.get(HEAD, {}).get("kernel", found[EMBEDDING]["embedding"])
        layer += 2 * gathered if work.fsdp > 1 else 0
        logits += gathered + head.size * head.dtype.itemsize
    parts = {
        "frozen weights": weights // (work.fsdp * work.tensor),
        "adapter": adapter,
        "optimizer and gradients": work.adapters * (trained + moments),
        "saved activations": _activation_bytes(work) + _dora_bytes(params, work),
        "one layer, or logits": max(layer, logits),
    }
    if work.compute.platform in LOOPING_PLATFORMS:
        # Before step 1 the layers are there twice, but nothing of a step is.
        twice = sum(map(_frozen_bytes, params["layers"].values()))
        twice //= work.fsdp * work.tensor
        of_step = parts["saved activations"] + parts["one layer, or logits"]
        parts["layers, while stacked"] = max(0, twice - of_step)
    return parts


def moments_bytes(trainable: Params, work: Workload) -> int:
    """Returns the bytes of both moments of AdamW; other rules need no more."""
    if work.optimizer != "adamw_8bit":
        leaves = jax.tree.leaves(jax.eval_shape(stack_layers, trainable))
        return 2 * sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(trainable)]
    # An update has both moments of an array in float32.
    return 2 * (sum(map(moment_bytes, sizes)) + 4 * max(sizes))


def _frozen_bytes(layer: Params) -> int:
    leaves = jax.tree.leaves(split(layer, trainable_mask(layer))[1])
    return sum(x.size * x.dtype.itemsize for x in leaves)


def _layer_bytes(work: Workload, *, is_quantized: bool) -> int:
    """Returns the bytes of the temporary arrays of the layer that is being differentiated.

    Of the MLP: gate, up and act with their gradients, as far as they are not among the
    saved activations; of the other parts what remat saves elsewhere.
    """
    c, size = work.config, jnp.dtype(work.compute.dtype).itemsize
    tokens = work.rows * work.length
    width = c.num_attention_heads * c.head_dim + c.num_key_value_heads * c.head_dim
    if work.compute.remat in ("full", "offload"):
        pieces = num_pieces(work.rows, work.length, c.intermediate_size)
        piece = tokens // pieces if is_quantized else tokens
        mlp = piece * (6 * c.intermediate_size + c.hidden_size)
        return size * (mlp + tokens * (3 * c.hidden_size + 2 * width))
    return size * tokens * 3 * (c.intermediate_size + c.hidden_size)


def _activation_bytes(work: Workload) -> int:
    """Returns the bytes kept for the backward pass; see `decoder_layer.SAVED_NAMES`.

    Of the inputs that remat "offload" keeps on the host, two are on the device at a time.
    """
    c, size = work.config, jnp.dtype(work.compute.dtype).itemsize
    d, f = c.hidden_size, c.intermediate_size
    q, kv = (
        heads * c.head_dim for heads in (c.num_attention_heads, c.num_key_value_heads)
    )
    layers = c.num_hidden_layers
    kept = {
        "offload": 2 * d * size,
        "full": layers * d * size,
        "minimal": layers * (2 * d + 2 * q + 2 * kv + 2 * f) * size,
        # Without remat the norms' float32 inputs and SwiGLU's parts stay as well.
        "none": layers * ((8 * d + 2 * q + 2 * kv + 5 * f) * size + 8 * d),
    }[work.compute.remat]
    scores = 0
    # Float32 scores and weights, of one layer or of all.
    if work.compute.attention == "xla":
        per_layer = 2 * 4 * c.num_attention_heads * work.length * work.context
        scores = per_layer * (layers if work.compute.remat == "none" else 1)
    return work.rows * work.length * (kept + scores)


def host_bytes(work: Workload) -> int:
    """Returns the bytes per device that remat "offload" keeps in the host's memory."""
    if work.compute.remat != "offload" or work.compute.platform == "cpu":
        return 0
    per_token = work.config.hidden_size * jnp.dtype(work.compute.dtype).itemsize
    # The last layer's input stays on the device, as the backward pass begins with it; but
    # not in a loop over layers.
    kept = work.config.num_hidden_layers - (
        work.compute.platform not in LOOPING_PLATFORMS
    )
    return work.rows * work.length * kept * per_token


def _dequantised_bytes(params: Params, work: Workload) -> int:
    """Returns the bytes of quantised kernels that are dequantised at the same time.

    This counts the three largest: those of an MLP. Codes that are multiplied themselves are
    only transposed.
    """
    size = jnp.dtype(work.compute.dtype).itemsize
    sizes = sorted(
        math.prod(kernel_shape(leaves))
        * (1 if multiplies_codes(leaves, work.compute) else size)
        for leaves in modules(params).values()
        if is_quantized(leaves)
    )
    return sum(sizes[-3:])


def _dora_bytes(params: Params, work: Workload) -> int:
    """Returns the bytes of the products that DoRA alone keeps: not those of gate and up."""
    sizes = [
        leaves["lora_magnitude"].size
        for name, leaves in modules(params).items()
        if ".layers." in name
        and not name.endswith(("gate_proj", "up_proj"))
        and "lora_magnitude" in leaves
    ]
    tokens = 0 if work.compute.remat in ("full", "offload") else work.rows * work.length
    return tokens * sum(sizes) * jnp.dtype(work.compute.dtype).itemsize


def device_memory_bytes(mesh: Mesh) -> int:
    """Returns the memory that each device of a mesh offers; on CPU, that of the machine."""
    device = mesh.devices.flat[0]
    if device.process_index != jax.process_index():
        device = jax.local_devices()[0]  # of the others nothing is known here
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", host_memory_bytes())


def host_memory_bytes() -> int:
    """Returns the memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes() -> int:
    """Returns the most memory used so far: of the device, or of the process on CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
