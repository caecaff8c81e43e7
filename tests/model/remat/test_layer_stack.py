"""Remat "offload" and gathered weights: gradients as without, whatever is trained."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.fake_devices import mesh_of
from helpers.training_cases import (
    ADAM,
    ALL_LINEAR,
    Run,
    adapted_params,
    equations,
    llama_config,
    quantized,
    ragged_batch,
)
from jax.extend.core import Var

from jlora.config.run_config import ComputeConfig, MeshConfig
from jlora.lora.adapter_tree import join, split, trainable_mask
from jlora.model.decoding.kv_cache import KVCache
from jlora.model.llama import Llama
from jlora.train import memory_estimate as plan
from jlora.train.optimizer import make_optimizer, make_schedule
from jlora.train.step import TrainState, summed_loss
from jlora.train.sweep import make_sweep_trainer
from jlora.train.trainer import TrainedAdapter

CONFIG = llama_config(num_hidden_layers=3)
EVERYWHERE = replace(ALL_LINEAR, target_modules=["q_proj", "down_proj", "embed_tokens"])


def loss_of(remat, lora, dropout):
    model = Llama(CONFIG, remat=remat, lora_dropout=dropout)
    params = adapted_params(CONFIG, lora)
    trainable, frozen = split(params, trainable_mask(params))
    batch = jax.tree.map(jnp.asarray, ragged_batch(rows=4))

    def loss(trainable):
        key = jax.random.key(0) if dropout else None
        params = join(trainable, frozen)
        return summed_loss(model, params, batch, packed=True, chunk=5, dropout_key=key)

    return loss, trainable


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max()
        assert scale > 0
        # Other fusions: some units in the last place of the largest terms; how many
        # depends on the processor (up to 2.2e-6 seen).
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    ("lora", "dropout"),
    [
        (ALL_LINEAR, 0.2),
        (EVERYWHERE, 0.0),  # the embedding's adapter needs the gradient of the input
        (replace(ALL_LINEAR, use_dora=True), 0.0),
        (replace(ALL_LINEAR, target_modules=["v_proj"], layers_to_transform=[1]), 0.0),
        (replace(ALL_LINEAR, modules_to_save=["input_layernorm", "lm_head"]), 0.0),
    ],
)
def test_gradients_are_those_without_remat(lora, dropout):
    found, expected = (
        jax.jit(jax.value_and_grad(loss))(trainable)
        for loss, trainable in (
            loss_of(remat, lora, dropout) for remat in ("offload", "none")
        )
    )
    assert_close(found, expected)


def test_every_copy_is_tied_to_a_layer():
    loss, trainable = loss_of("offload", ALL_LINEAR, 0.0)
    steps = jax.make_jaxpr(jax.grad(loss))(trainable).eqns
    tied = {"optimization_barrier"}
    places = []
    for step in steps:
        if step.primitive.name == "device_put":
            (place,) = step.params["devices"]
            if place in (jax.memory.Space.Host, jax.memory.Space.Device):
                places.append(place)
                # To the host: a barrier ends it. Back: one begins it, and one ends it.
                after = {s.primitive.name for s in steps if step.outvars[0] in s.invars}
                before = {
                    s.primitive.name for s in steps if step.invars[0] in s.outvars
                }
                assert tied <= after
                assert place == jax.memory.Space.Host or before == tied
    # All but the last layer's, which is needed again at once.
    assert places == [jax.memory.Space.Host] * 2 + [jax.memory.Space.Device] * 2
    # Each copy to the host and back, what the last layer is made again from, each layer's
    # leaves, and the end of its gradient.
    names = [step.primitive.name for step in steps]
    assert names.count("optimization_barrier") == 2 + 2 + 1 + 3 + 3


# Sizes of which every device has whole blocks of nf4.
BLOCKS = llama_config(
    num_hidden_layers=4, hidden_size=128, intermediate_size=128, head_dim=8
)


def gathered_names(jaxpr):
    """The names that hold a gathered array, and which one: barriers give it new names."""
    names = {}
    for place, step in enumerate(jaxpr.eqns):
        if step.primitive.name == "all_gather":
            names[step.outvars[0]] = place
        elif step.primitive.name == "optimization_barrier":
            pairs = zip(step.invars, step.outvars, strict=True)
            names |= {new: names[old] for old, new in pairs if old in names}
    return names


@pytest.mark.parametrize("stored", ["float32", "nf4"])
@pytest.mark.parametrize("remat", ["none", "minimal", "full", "offload"])
def test_a_device_holds_the_weights_of_two_layers(remat, stored):
    params = adapted_params(BLOCKS)
    params = quantized(params) if stored == "nf4" else params
    run = Run(MeshConfig(1, 2), config=BLOCKS, params=params, remat=remat)
    jaxpr = run.step.trace(run.state, run.frozen, ragged_batch()).jaxpr.jaxpr
    (mapped,) = [e for e in equations(jaxpr) if e.primitive.name == "shard_map"]
    steps = mapped.params["jaxpr"].eqns
    gathers = [e for e in steps if e.primitive.name == "all_gather"]
    # Quantised weights have codes and scales. Embedding and head are gathered once, and each
    # layer once more for its gradient.
    leaves = 7 * (2 if stored == "nf4" else 1)
    assert len(gathers) == 2 * leaves * BLOCKS.num_hidden_layers + 2
    assert not [e for e in equations(jaxpr) if e.primitive.name == "all_gather"][
        len(gathers) :
    ]
    dtypes = Counter(e.outvars[0].aval.dtype.name for e in gathers)
    assert dtypes["uint8"] == (len(gathers) // 2 - 1 if stored == "nf4" else 0)
    names = gathered_names(mapped.params["jaxpr"])
    last = {}
    for place, step in enumerate(steps):
        for name in step.invars:
            if isinstance(name, Var) and name in names:
                last[names[name]] = place
    most = max(
        sum(first <= place <= end for first, end in last.items())
        for place in range(len(steps))
    )
    assert len(last) == len(gathers)
    assert most <= 2 * leaves + 2


def test_eight_devices_train_as_without_remat():
    mesh = MeshConfig(2, 2, 2)
    found, expected = (
        Run(mesh, config=CONFIG, remat=remat, lora_dropout=0.2).train(3)
        for remat in ("offload", "none")
    )
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=3e-6)  # 1.4e-6 seen: other fusions


def test_a_sweep_of_dropout_rates_trains_as_without_remat():
    run = Run(config=CONFIG)

    def train(remat):
        members = []
        for seed, rate in ((0, 0.0), (1, 0.4)):
            schedule = make_schedule(ADAM, 2)
            params = adapted_params(CONFIG)
            optimizer = make_optimizer(ADAM, schedule)
            state, frozen = TrainState.create(params, optimizer, run.mesh)
            members.append(TrainedAdapter(ADAM, seed, rate, state, frozen))
        sweep = make_sweep_trainer(
            members,
            Llama(CONFIG, remat=remat),
            run.mesh,
            total_steps=2,
            orders=[0, 0],
        )
        state, losses = sweep.state, []
        for step in range(2):
            state, metrics = sweep.step(state, [ragged_batch(step)])
            losses.append(np.asarray(metrics["loss"]))
        return losses

    np.testing.assert_allclose(train("offload"), train("none"), rtol=1e-6)


def test_decoding_and_logits_are_the_same():
    params, tokens = adapted_params(CONFIG), jnp.arange(12).reshape(2, 6)
    cache = KVCache.empty(CONFIG, 2, 8, jnp.float32)
    for method, more in (("__call__", ()), ("decode", (cache, jnp.full(2, 6)))):
        found, expected = (
            Llama(CONFIG, remat=remat).apply(
                {"params": params}, tokens, *more, method=method
            )
            for remat in ("offload", "none")
        )
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)


def test_auto_is_the_least_recomputation_that_fits(monkeypatch):
    params, mesh = adapted_params(CONFIG), mesh_of("gpu")
    expected = ["none", "minimal", "full", "offload"]

    def work(remat):
        compute = ComputeConfig(dtype="float32", remat=remat, attention="xla")
        return plan.plan_workload(
            CONFIG, params, mesh, compute=compute, rows=4, length=512
        )

    sizes = [sum(plan.memory_bytes(params, work(r)).values()) for r in expected]
    assert sizes == sorted(set(sizes), reverse=True)
    found = []
    for size in sizes:
        monkeypatch.setattr(
            plan,
            "device_memory_bytes",
            lambda _, size=size: (size + 1) / plan.USABLE_SHARE,
        )
        found.append(work("auto").compute.remat)
    assert found == expected
    monkeypatch.setattr(plan, "device_memory_bytes", lambda _: 1)
    assert work("auto").compute.remat == expected[-1]
