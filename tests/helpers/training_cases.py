"""A tiny random Llama with adapters, ragged batches and runs of the train step."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora.config.llama_config import LlamaConfig
from jlora.config.lora_config import LoraConfig
from jlora.config.optim_config import OptimConfig
from jlora.config.run_config import MeshConfig
from jlora.lora.adapter_tree import Params, is_trainable, map_leaves
from jlora.lora.initialisation import add_lora
from jlora.model.llama import Llama
from jlora.ops.quantize import quantize_kernel
from jlora.parallel.sharding import make_mesh
from jlora.train.optimizer import make_optimizer, make_schedule
from jlora.train.step import TrainState, make_train_step

# Every size a mesh may cut is a multiple of 8, and no two weights have the same shape
# as an activation: the tests that look for shapes rely on it.
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 56,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
ROWS, LENGTH = 32, 10
# Both A and B random: a zero B would hide what goes through A.
ALL_LINEAR = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
ADAM = OptimConfig(
    learning_rate=1e-2, lr_schedule="constant", warmup_ratio=0.0, weight_decay=0.1
)
ONE_DEVICE = MeshConfig(data=1)
# Every (data, fsdp, tensor) whose product is 8.
MESHES = [
    (data, fsdp, 8 // (data * fsdp))
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if data * fsdp <= 8
]


def llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig.from_hf(CONFIG | changes)


def shapes(config: LlamaConfig, dtype: Any = jnp.float32) -> Params:
    model = Llama(config)
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree["params"]
    )


def random_params(config: LlamaConfig, *, dtype: Any = jnp.float32) -> Params:
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        center = float(path[-1].key == "scale")
        array = center + 0.2 * rng.standard_normal(leaf.shape)
        return jnp.asarray(array, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes(config, dtype))


def adapted_params(
    config: LlamaConfig, lora: LoraConfig = ALL_LINEAR, *, dtype: Any = jnp.float32
) -> Params:
    return add_lora(random_params(config, dtype=dtype), lora, jax.random.key(1))


def quantized(params: dict[str, Any]) -> dict[str, Any]:
    """Returns the tree with every kernel in nf4, but the head's."""
    if "kernel" not in params:
        return {
            name: quantized(part)
            if isinstance(part, dict) and name != "lm_head"
            else part
            for name, part in params.items()
        }
    stored = quantize_kernel(np.asarray(params["kernel"]), "nf4")
    return {k: v for k, v in params.items() if k != "kernel"} | stored


def moved(params: Params) -> Params:
    """Returns the adapter away from its start, where B is zero."""

    def move(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
        if not is_trainable(path[-1]):
            return leaf
        key = jax.random.key(sum(map(ord, "".join(path))))
        return leaf + 0.05 * jax.random.normal(key, leaf.shape)

    return map_leaves(move, params)


def logits_of(
    model: Llama, params: Params, tokens: jax.Array, method: str | None = None
) -> np.ndarray:
    apply = jax.jit(model.apply, static_argnames="method")
    return np.asarray(apply({"params": params}, tokens, method=method))


def random_tokens(rows: int, length: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG["vocab_size"], (rows, length))
    return jnp.asarray(tokens, jnp.int32)


def ragged_batch(
    step: int = 0, *, rows: int = ROWS, length: int = LENGTH
) -> dict[str, np.ndarray]:
    """Packed rows: two documents and padding, from no to all tokens supervised."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, CONFIG["vocab_size"], (rows, length)).astype(np.int32)
    index = np.arange(length, dtype=np.int32)[None]
    first = rng.integers(1, length - 2, (rows, 1))
    end = rng.integers(length - 2, length + 1, (rows, 1))
    segment_ids = np.where(index < first, 1, np.where(index < end, 2, 0))
    positions = np.where(index < first, index, index - first)
    share = rng.random((rows, 1)) * (rng.random((rows, 1)) < 0.7)
    mask = (rng.random((rows, length)) < share) & (segment_ids > 0)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_mask": mask.astype(np.float32),
        "segment_ids": segment_ids.astype(np.int32),
        "positions": positions.astype(np.int32),
    }


class Run:
    """A train step, its state and its frozen weights on one mesh."""

    def __init__(
        self,
        mesh: MeshConfig = ONE_DEVICE,
        *,
        config: LlamaConfig | None = None,
        params: Params | None = None,
        optim: OptimConfig = ADAM,
        grad_accum_steps: int = 1,
        lora_dropout: float = 0.0,
        remat: str = "none",
        kernels: str = "xla",
        dtype: Any = jnp.float32,
        total_steps: int = 10,
        seed: int = 0,
    ) -> None:
        size = max(mesh.data, 1) * mesh.fsdp * mesh.tensor * mesh.context
        self.mesh = make_mesh(mesh, jax.devices()[:size])
        config = llama_config(num_hidden_layers=1) if config is None else config
        params = adapted_params(config) if params is None else params
        self.model = Llama(
            config,
            dtype,
            remat=remat,
            lora_dropout=lora_dropout,
            kernels=kernels,
        )
        self.optimizer = make_optimizer(optim, make_schedule(optim, total_steps))
        self.state, self.frozen = TrainState.create(params, self.optimizer, self.mesh)
        self.step = make_train_step(
            self.model,
            self.optimizer,
            self.mesh,
            state=self.state,
            frozen=self.frozen,
            grad_accum_steps=grad_accum_steps,
            seed=seed,
        )

    def train(self, steps: int, length: int = LENGTH) -> list[dict[str, float]]:
        """Goes on for some steps and returns their metrics."""
        metrics = []
        for _ in range(steps):
            batch = ragged_batch(int(self.state.step), length=length)
            self.state, found = self.step(self.state, self.frozen, batch)
            metrics.append({name: value.item() for name, value in found.items()})
        return metrics


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yields every equation under a jaxpr once per place where it runs."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)
