"""The fused projections against plain ones: the algebra in float32, the kernels simulated."""

from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_cases import (
    ALL_LINEAR,
    Run,
    adapted_params,
    equations,
    llama_config,
    moved,
    ragged_batch,
)

from jlora.config.lora_config import LoraConfig
from jlora.config.run_config import MeshConfig
from jlora.formats.digests import flatten
from jlora.lora.adapter_tree import is_trainable, join, split, trainable_mask
from jlora.model.llama import Llama
from jlora.ops.dropout import drop, drop_by, seeds
from jlora.ops.hopper import dropout_kernels as hopper_dropout
from jlora.ops.hopper import fused_projections as fused
from jlora.ops.hopper import low_rank as narrow
from jlora.ops.hopper import matmul_kernel as hopper
from jlora.ops.hopper import product_kernels as hopper_products
from jlora.ops.hopper import swiglu_kernel as hopper_swiglu
from jlora.ops.hopper.fused_projections import Leaves
from jlora.parallel.sharding import make_mesh
from jlora.train.evaluation import make_eval_step

D, F, K = 24, 40, 12
ONE_LAYER = llama_config(num_hidden_layers=1)


def leaves(key: int, size_in: int, size_out: int, rank: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(key), 3)
    drawn = {"kernel": size_in**-0.5 * jax.random.normal(keys[0], (size_in, size_out))}
    if rank:
        drawn["lora_A"] = size_in**-0.5 * jax.random.normal(keys[1], (size_in, rank))
        drawn["lora_B"] = rank**-0.5 * jax.random.normal(keys[2], (rank, size_out))
        drawn["lora_scaling"] = jnp.float32(1.5)
    return drawn


def plain(x: jax.Array, layer: Leaves) -> jax.Array:
    y = x @ layer["kernel"]
    if "lora_A" in layer:
        y += x @ layer["lora_A"] @ layer["lora_B"] * layer["lora_scaling"]
    return y


def plain_swiglu(x: jax.Array, gate: Leaves, up: Leaves, down: Leaves) -> jax.Array:
    return plain(jax.nn.silu(plain(x, gate)) * plain(x, up), down)


def plain_swiglu_backward(
    gate: jax.Array,
    up: jax.Array,
    d_act: jax.Array,
    narrow: Any,
    b: Any,
    dropped: hopper_swiglu.Dropped | None = None,
    *,
    rate: float = 0.0,
) -> hopper_swiglu.Gradients:
    """What the kernel makes; the gradients are rounded once, to the dtype of gate."""
    wide = [x.astype(jnp.float32) for x in (gate, up)]
    act, back = jax.vjp(lambda g, u: jax.nn.silu(g) * u, *wide)
    d_act, act = d_act.astype(jnp.float32), act.astype(gate.dtype)
    if dropped is not None:
        d_act += drop_by(dot(narrow[2], dropped.a.T), dropped.seeds, rate)
        act = drop_by(act.astype(jnp.float32), dropped.seeds, rate)
    dys = [y.astype(gate.dtype) for y in back(d_act)]
    return hopper_swiglu.Gradients(
        gate=dys[0],
        up=dys[1],
        s_gate=dot(dys[0], b[0].T),
        s_up=dot(dys[1], b[1].T),
        b_gate=dot(narrow[0].T, dys[0]),
        b_up=dot(narrow[1].T, dys[1]),
        a_down=dot(act.T, narrow[2].astype(act.dtype)),
    )


def plain_swiglu_gradients(
    xs: Any, weights: Any, gate: jax.Array, up: jax.Array
) -> list[jax.Array]:
    d_act = sum(dot(x, w.T) for x, w in zip(xs, weights, strict=True))
    wide = [x.astype(jnp.float32) for x in (gate, up)]
    _, back = jax.vjp(lambda g, u: jax.nn.silu(g) * u, *wide)
    return [y.astype(gate.dtype) for y in back(d_act)]


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision="highest", preferred_element_type=jnp.float32)


def plain_down(
    x: jax.Array, weights: Any, seeds: Any, *, rate: float, width: int
) -> jax.Array:
    pairs = zip(weights, seeds, strict=True)
    made = jnp.concatenate([drop_by(x, seed, rate) @ w for w, seed in pairs], axis=1)
    return jnp.pad(made, ((0, 0), (0, width - made.shape[1])))


def plain_through_dropout(
    x: jax.Array, ds: jax.Array, weights: Any, seeds: Any, *, rate: float
) -> tuple[jax.Array, list[jax.Array]]:
    own = jnp.split(ds[:, : sum(w.shape[1] for w in weights)], len(weights), axis=1)
    terms = list(zip(own, weights, seeds, strict=True))
    sent = [drop_by(ds @ w.T, seed, rate) for ds, w, seed in terms]
    sums = [drop_by(x, seed, rate).T @ ds for ds, _, seed in terms]
    return sum(sent), sums  # type: ignore[return-value]


@pytest.fixture
def _products_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def sum_of_products(xs, weights, addend=0, *, transposed=False):
        return [
            sum(x @ (w.T if transposed else w) for x, w in zip(xs, group, strict=True))
            + (0 if addend is None else addend)
            for group in weights
        ]

    def swiglu(xs, gate, up):
        g, u = sum_of_products(xs, [gate, up])
        return [g, u, jax.nn.silu(g) * u]

    monkeypatch.setattr(hopper_swiglu, "swiglu_backward", plain_swiglu_backward)
    monkeypatch.setattr(hopper_products, "sum_of_products", sum_of_products)
    monkeypatch.setattr(hopper_products, "swiglu", swiglu)
    monkeypatch.setattr(hopper_products, "swiglu_gradients", plain_swiglu_gradients)
    monkeypatch.setattr(hopper, "ROWS", 1)
    monkeypatch.setattr(hopper, "COLUMNS", 1)
    monkeypatch.setattr(hopper_dropout, "down", plain_down)
    monkeypatch.setattr(hopper_dropout, "through_dropout", plain_through_dropout)


def gradients(function: Any, x: jax.Array, layers: list[dict[str, Any]]) -> Any:
    adapters = [
        {k: v for k, v in layer.items() if k in ("lora_A", "lora_B")}
        for layer in layers
    ]

    def total(x: jax.Array, adapters: Any) -> jax.Array:
        joined = [{**layer, **own} for layer, own in zip(layers, adapters, strict=True)]
        outs = function(x, joined)
        return sum(jnp.sum(jnp.sin(y)) for y in outs)  # type: ignore[return-value]

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(x, adapters)


def assert_close(found: Any, expected: Any) -> None:
    def check(a: jax.Array, b: jax.Array) -> None:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # float32 sums

    jax.tree.map(check, found, expected)


@pytest.mark.usefixtures("_products_without_a_gpu")
@pytest.mark.parametrize("ranks", [(2, 0, 4), (0, 0, 0), (70, 1, 1)])
def test_grouped_projections_equal_single_ones_in_output_and_gradient(ranks) -> None:
    x = jax.random.normal(jax.random.key(9), (2, 5, D))
    layers = [
        leaves(i, D, n, r)
        for i, (n, r) in enumerate(zip((D, K, K), ranks, strict=True))
    ]
    found = gradients(fused.project, x, layers)
    expected = gradients(lambda x, ls: [plain(x, leaf) for leaf in ls], x, layers)
    assert_close(found, expected)


@pytest.mark.usefixtures("_products_without_a_gpu")
@pytest.mark.parametrize("ranks", [(2, 3, 4), (0, 8, 0), (0, 0, 0), (3, 0, 40)])
def test_fused_swiglu_equals_the_plain_block_in_output_and_gradient(ranks) -> None:
    x = 0.3 * jax.random.normal(jax.random.key(9), (2, 5, D))
    sizes = ((D, F), (D, F), (F, D))
    layers = [
        leaves(i, *size, r)
        for i, (size, r) in enumerate(zip(sizes, ranks, strict=True))
    ]
    found = gradients(lambda x, ls: [fused.swiglu(x, ls, 2 * x)], x, layers)
    expected = gradients(lambda x, ls: [2 * x + plain_swiglu(x, *ls)], x, layers)
    assert_close(found, expected)


@pytest.mark.usefixtures("_products_without_a_gpu")
def test_gradients_of_fused_adapters_are_float32() -> None:
    x = jnp.ones((1, 4, D), jnp.bfloat16)
    layer = leaves(0, D, D, 2)
    layer["kernel"] = layer["kernel"].astype(jnp.bfloat16)
    _, (_, (found,)) = gradients(fused.project, x, [layer])
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


RATE = 0.4


def dropped(x: jax.Array, layer: Leaves, key: jax.Array) -> jax.Array:
    y = x @ layer["kernel"]
    if "lora_A" in layer:
        s = drop(x, key, RATE) @ layer["lora_A"]
        y += s @ layer["lora_B"] * layer["lora_scaling"]
    return y


@pytest.mark.usefixtures("_products_without_a_gpu")
def test_grouped_projections_with_dropout_equal_single_ones() -> None:
    x = jax.random.normal(jax.random.key(9), (2, 5, D))
    keys = [jax.random.key(i) for i in (5, 6, 7)]
    dropout = narrow.Dropout(RATE, [seeds(key) for key in keys])
    layers = [
        leaves(i, D, n, r)
        for i, (n, r) in enumerate(zip((D, K, K), (20, 0, 1), strict=True))
    ]

    def single(x: jax.Array, layers: Any) -> list[jax.Array]:
        return [dropped(x, *pair) for pair in zip(layers, keys, strict=True)]

    found = gradients(lambda x, ls: fused.project(x, ls, dropout=dropout), x, layers)
    assert_close(found, gradients(single, x, layers))


@pytest.mark.usefixtures("_products_without_a_gpu")
@pytest.mark.parametrize("ranks", [(2, 0, 4), (20, 3, 1), (0, 5, 0), (0, 0, 0)])
def test_fused_swiglu_with_dropout_equals_the_plain_block(ranks) -> None:
    x = 0.3 * jax.random.normal(jax.random.key(9), (2, 5, D))
    keys = [jax.random.key(i) for i in (5, 6, 7)]
    dropout = narrow.Dropout(RATE, [seeds(key) for key in keys])
    layers = [
        leaves(i, *size, r)
        for i, (size, r) in enumerate(zip(((D, F), (D, F), (F, D)), ranks, strict=True))
    ]

    def block(x: jax.Array, layers: Any) -> list[jax.Array]:
        gate, up = (dropped(x, layers[i], keys[i]) for i in (0, 1))
        return [2 * x + dropped(jax.nn.silu(gate) * up, layers[2], keys[2])]

    found = gradients(lambda x, ls: [fused.swiglu(x, ls, 2 * x, dropout)], x, layers)
    assert_close(found, gradients(block, x, layers))


def losses(model: Llama, params: Any, tokens: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
        rngs = {"dropout": jax.random.key(3)}
        logits: Any = model.apply({"params": params}, tokens, rngs=rngs)
        return jnp.mean(jax.nn.log_softmax(logits)[..., 3])

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.usefixtures("_products_without_a_gpu")
@pytest.mark.parametrize("remat", ["minimal", "full"])
@pytest.mark.parametrize(
    ("use_dora", "rate"), [(False, 0.0), (True, 0.0), (False, 0.3)]
)
def test_model_with_fused_projections_equals_the_plain_model(
    remat: str, use_dora: bool, rate: float
) -> None:
    config = llama_config()
    params = moved(adapted_params(config, replace(ALL_LINEAR, use_dora=use_dora)))
    tokens = jax.random.randint(jax.random.key(0), (2, 5), 0, config.vocab_size)
    plain_model = Llama(config, lora_dropout=rate)
    fast = Llama(config, remat=remat, lora_dropout=rate, kernels="hopper")
    expected, expected_gradient = losses(plain_model, params, tokens)
    found, gradient = losses(fast, params, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for (path, a), (_, b) in zip(
        jax.tree_util.tree_leaves_with_path(gradient),
        jax.tree_util.tree_leaves_with_path(expected_gradient),
        strict=True,
    ):
        if is_trainable(path[-1].key):
            # Some masks leave sums that cancel: 1.4e-5 of the largest over six keys.
            atol = 2e-5 * np.abs(b).max() if rate else 1e-5
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(
    ("lora", "rate", "swiglu"),
    [
        (ALL_LINEAR, 0.0, "swiglu_backward"),
        (ALL_LINEAR, 0.1, "swiglu_backward"),
        (replace(ALL_LINEAR, use_dora=True), 0.0, None),
        (LoraConfig(r=2), 0.0, "swiglu_gradients"),
    ],
)
@pytest.mark.parametrize("remat", ["none", "minimal"])
def test_no_kernel_runs_twice_in_a_gradient(
    remat: str, lora: LoraConfig, rate: float, swiglu: str | None
) -> None:
    # A layer has 4 forward and 4 backward; the first layer's input needs no gradient,
    # but that product is dropped by the compiler only.
    config = llama_config(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
    )
    params = adapted_params(config, lora, dtype=jnp.bfloat16)
    trainable, frozen = split(params, trainable_mask(params))
    model = Llama(
        config, jnp.bfloat16, remat=remat, lora_dropout=rate, kernels="hopper"
    )

    def total(trainable: Any) -> jax.Array:
        tokens = jnp.zeros((1, 256), jnp.int32)
        params, rngs = join(trainable, frozen), {"dropout": jax.random.key(2)}
        logits: Any = model.apply({"params": params}, tokens, rngs=rngs)
        return logits.sum()

    jaxpr = jax.make_jaxpr(jax.grad(total))(trainable).jaxpr
    count = Counter(e.params.get("name") for e in equations(jaxpr))
    products = count["sum_of_products"] + count["swiglu"] + count["swiglu_gradients"]
    assert products == 16
    for name in ("swiglu_backward", "swiglu_gradients"):
        assert count[name] == (2 if name == swiglu else 0)


@pytest.mark.parametrize("transposed", [False, True])
def test_simulated_kernels_equal_products_in_float32(
    monkeypatch: pytest.MonkeyPatch, transposed: bool
) -> None:
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 2)
    keys = jax.random.split(jax.random.key(0), 4)
    x, s = (
        jax.random.normal(key, (256, k), jnp.bfloat16)
        for key, k in zip(keys, (256, 64), strict=False)
    )
    w, b = (
        jax.random.normal(key, (k, 256), jnp.bfloat16)
        for key, k in zip(keys[2:], (256, 64), strict=True)
    )
    try:
        (found,) = hopper_products.sum_of_products(
            [x, s],
            [[w.T, b.T] if transposed else [w, b]],
            2 * w,
            transposed=transposed,
            interpret=params.InterpretGPUParams(),
        )
    except NotImplementedError:
        pytest.skip("this jax does not simulate blocks that share a tile; 0.11 does")
    x, s, w, b = (y.astype(jnp.float32) for y in (x, s, w, b))
    expected = x @ w + s @ b + 2 * w
    # One rounding to bfloat16.
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-3)


def test_simulated_swiglu_gradients_equal_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 2)
    shapes = (512, 128), (512, 64), (512, 128), (512, 64), (512, 512), (512, 512)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    dy, ds, w, a, gate, up = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    )
    arguments = [dy, ds], [w, a], gate, up  # four tiles for one pair of blocks
    try:
        found = hopper_products.swiglu_gradients(
            *arguments, interpret=params.InterpretGPUParams()
        )
    except NotImplementedError:
        pytest.skip("this jax does not simulate blocks that share a tile; 0.11 does")
    expected = plain_swiglu_gradients(*arguments)
    for a, b in zip(found, expected, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        # Now and then a gradient is rounded the other way, by one step.
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 cannot simulate the kernel"
)
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_simulated_swiglu_backward_equals_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, width: int, rate: float
) -> None:
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 4)
    rows, columns = 192, 512  # two bands of columns, two ranges of rows of unequal size
    shapes = [(rows, columns)] * 3 + [(rows, width)] * 3 + [(width, columns)] * 2
    shapes.append((columns, width))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    gate, up, d_act, *thin, a = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    )
    dropped = hopper_swiglu.Dropped(a, seeds(keys[0])) if rate else None
    arguments = gate, up, d_act, thin[:3], thin[3:], dropped
    found = hopper_swiglu.swiglu_backward(
        *arguments, rate=rate, interpret=params.InterpretGPUParams()
    )
    expected = plain_swiglu_backward(*arguments, rate=rate)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        # Now and then a gradient is rounded the other way, by one step.
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b), name


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 cannot simulate the kernel"
)
@pytest.mark.parametrize(("masks", "rank"), [(2, 16), (3, 32)])
def test_simulated_kernels_of_dropout_equal_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, masks: int, rank: int
) -> None:
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 4)
    keys = jax.random.split(jax.random.key(0), 8)
    width = 64 if masks * rank < 64 else 128
    x, ds, *weights = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(
            keys, [(512, 128), (512, width), *[(128, rank)] * masks], strict=False
        )
    )
    rest = weights, [seeds(key) for key in keys[-masks:]]
    interpret = params.InterpretGPUParams()
    s = hopper_dropout.down(x, *rest, rate=0.3, width=width, interpret=interpret)
    sent, sums = hopper_dropout.through_dropout(
        x, ds, *rest, rate=0.3, interpret=interpret
    )

    x, ds, rest = jax.tree.map(
        lambda y: y.astype(jnp.float32) if y.dtype == jnp.bfloat16 else y, (x, ds, rest)
    )
    expected = plain_down(x, *rest, rate=0.3, width=width)
    expected_sent, expected_sums = plain_through_dropout(x, ds, *rest, rate=0.3)
    for found, wanted in ((s, expected), (sent, expected_sent)):
        # One rounding to bfloat16.
        np.testing.assert_allclose(found, wanted, rtol=2**-8, atol=1e-3)
    for found, wanted in zip(sums, expected_sums, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def trained(mesh: MeshConfig, kernels: str, **settings: Any) -> Any:
    run = Run(
        mesh, params=moved(adapted_params(ONE_LAYER)), kernels=kernels, **settings
    )
    metrics = run.train(2)
    # Sums of gradients. Adapters would show the rounding of small ones: AdamW divides.
    moments = {k: v for k, v in flatten(run.state).items() if ".mu." in k}
    assert len(moments) == len(jax.tree.leaves(run.state.trainable))
    return metrics, moments


@pytest.mark.usefixtures("_products_without_a_gpu")
@pytest.mark.parametrize("remat", ["none", "minimal", "offload"])
@pytest.mark.parametrize("settings", [{"lora_dropout": 0.3}, {"grad_accum_steps": 4}])
def test_devices_with_all_weights_and_own_rows_train_as_one(
    remat: str, settings: dict[str, Any]
) -> None:
    metrics, moments = trained(MeshConfig(8), "hopper", remat=remat, **settings)
    for mesh, kernels in ((MeshConfig(1), "hopper"), (MeshConfig(2, 2, 2), "xla")):
        expected, same = trained(mesh, kernels, remat="none", **settings)
        for found, wanted in zip(metrics, expected, strict=True):
            assert found == pytest.approx(wanted, rel=2e-6)
        for name, moment in moments.items():
            atol = 3e-5 * np.abs(same[name]).max()  # measured 1e-5
            np.testing.assert_allclose(
                moment, same[name], rtol=0, atol=atol, err_msg=name
            )


@pytest.mark.usefixtures("_products_without_a_gpu")
def test_devices_with_own_rows_evaluate_as_one() -> None:
    params, batch, found = moved(adapted_params(ONE_LAYER)), ragged_batch(), []
    for devices, kernels in ((8, "hopper"), (1, "xla")):
        mesh = make_mesh(MeshConfig(devices), jax.devices()[:devices])
        step = make_eval_step(Llama(ONE_LAYER, kernels=kernels), mesh, params=params)
        jaxpr = step.trace(params, batch).jaxpr.jaxpr
        names = {equation.primitive.name for equation in equations(jaxpr)}
        # The compiler can cut what stands in for the kernels here, but not the kernels.
        assert ("shard_map" in names) == (devices > 1)
        found.append([float(x) for x in step(params, batch)])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
