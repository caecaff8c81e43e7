import gc
import weakref
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from helpers.training_cases import (
    ADAM,
    ONE_DEVICE,
    equations,
    llama_config,
    ragged_batch,
    random_params,
)

from jlora.config.lora_config import LoraConfig
from jlora.config.run_config import MeshConfig, TrainConfig
from jlora.errors import UsageError
from jlora.lora.initialisation import add_lora
from jlora.model.llama import Llama
from jlora.parallel.sharding import make_mesh
from jlora.train.compiler_options import COMPILER_OPTIONS
from jlora.train.loop import _make_trainer
from jlora.train.optimizer import make_optimizer, make_schedule
from jlora.train.run import Run
from jlora.train.step import TrainState, make_train_step
from jlora.train.sweep import make_sweep_trainer
from jlora.train.trainer import TrainedAdapter

STEPS = 4
CONFIG = llama_config(num_hidden_layers=1)
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
LINEAR = replace(ADAM, lr_schedule="linear", warmup_ratio=0.3)
WILD = replace(
    LINEAR,
    learning_rate=3e-2,
    lr_schedule="cosine",
    warmup_ratio=0.5,
    weight_decay=0.3,
    max_grad_norm=0.05,
    loraplus_lr_ratio=4.0,
)
UNCLIPPED = replace(LINEAR, max_grad_norm=0.0, weight_decay=0.0)
UNEVEN = LoraConfig(
    r=4,
    lora_alpha=7,
    use_rslora=True,
    rank_pattern={"v_proj": 5},
    target_modules=LORA.target_modules,
    init_lora_weights=False,
)
# name: per adapter (optimizer, adapter, seed, order of the data)
CASES: dict[str, list[tuple[Any, ...]]] = {
    "optimizer": [(LINEAR, LORA, 0, 0), (WILD, LORA, 0, 0), (UNCLIPPED, LORA, 0, 0)],
    "adapters": [(LINEAR, LORA, 0, 0), (LINEAR, UNEVEN, 1, 0)],
    "orders": [(LINEAR, replace(LORA, lora_dropout=0.3), s, s) for s in (0, 1)],
    "dora from pissa": [
        (LINEAR, replace(LORA, r=r, use_dora=True, init_lora_weights="pissa"), 0, 0)
        for r in (2, 3)
    ],
    "dropout": [(LINEAR, replace(LORA, lora_dropout=p), 1, 0) for p in (0.0, 0.4)],
}


def batches(order):
    return [ragged_batch(100 * order + step, rows=8) for step in range(STEPS)]


def start(optim, lora, seed, mesh):
    params = add_lora(random_params(CONFIG), lora, jax.random.key(seed))
    optimizer = make_optimizer(optim, make_schedule(optim, STEPS))
    return optimizer, *TrainState.create(params, optimizer, mesh)


def train_alone(settings, mesh, accumulate):
    optim, lora, seed, order = settings
    optimizer, state, frozen = start(optim, lora, seed, mesh)
    step = make_train_step(
        Llama(CONFIG, lora_dropout=lora.lora_dropout),
        optimizer,
        mesh,
        state=state,
        frozen=frozen,
        grad_accum_steps=accumulate,
        seed=seed,
    )
    found = []
    for batch in batches(order):
        state, metrics = step(state, frozen, batch)
        found.append({name: value.item() for name, value in metrics.items()})
    return found, state


def make_sweep(case, mesh, accumulate=1):
    members = [
        TrainedAdapter(
            optim, seed, lora.lora_dropout, *start(optim, lora, seed, mesh)[1:]
        )
        for optim, lora, seed, _ in case
    ]
    return make_sweep_trainer(
        members,
        Llama(CONFIG),
        mesh,
        total_steps=STEPS,
        orders=[order for *_, order in case],
        grad_accum_steps=accumulate,
    )


def train_together(case, mesh, accumulate=1):
    sweep = make_sweep(case, mesh, accumulate)
    state, found = sweep.state, []
    for step in range(STEPS):
        orders = range(1 + max(order for *_, order in case))
        parts = [batches(order)[step] for order in orders]
        state, metrics = sweep.step(state, parts)
        found.append(metrics)
    return sweep, state, found


def mesh_of(**axes):
    config = MeshConfig(**axes) if axes else ONE_DEVICE
    size = config.data * config.fsdp * config.tensor
    return make_mesh(config, jax.devices()[:size])


def named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_equal_runs(case, mesh, accumulate=1):
    sweep, state, found = train_together(case, mesh, accumulate)
    for index, settings in enumerate(case):
        expected, alone = train_alone(settings, mesh, accumulate)
        for step, metrics in enumerate(expected):
            ours = {name: value[index].item() for name, value in found[step].items()}
            # One adapter's sums are made in another order beside others.
            assert ours == pytest.approx(metrics, rel=1e-6, abs=1e-6)
        ours, theirs = named(sweep.adapter_state(state, index)), named(alone)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            # AdamW divides by the gradient: where that is small, its rounding shows.
            np.testing.assert_allclose(
                ours[name], theirs[name], rtol=1e-5, atol=1e-5, err_msg=name
            )


@pytest.mark.parametrize("case", CASES)
def test_every_adapter_equals_its_own_run(case):
    assert_equal_runs(CASES[case], mesh_of())


def test_every_adapter_equals_its_own_run_on_eight_devices_with_accumulation():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    assert_equal_runs(CASES["adapters"], mesh, accumulate=2)


def test_every_adapter_with_dropout_equals_its_own_run_where_devices_have_all_weights():
    assert_equal_runs(CASES["dropout"], mesh_of(data=8))


def test_padding_stays_exactly_zero():
    _, state, _ = train_together(CASES["adapters"], mesh_of())
    arrays = named({"w": state.trainable, "o": state.opt_state})
    factors = [name for name in arrays if name.endswith(("lora_A", "lora_B"))]
    assert len(factors) >= 3 * len(named(state.trainable))  # and two moments of each
    for name in factors:
        leaf = arrays[name][0]
        ranks = leaf if name.endswith("lora_B") else leaf.T
        assert ranks[: LORA.r].any(), name
        assert not ranks[LORA.r :].any(), name


def products(jaxpr):
    for equation in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            shapes = [v.aval.shape for v in equation.invars]
            yield shapes, equation.params["dimension_numbers"][1]


def test_products_with_the_base_have_no_axis_of_adapters(monkeypatch):
    # A traced `jax.jit` cannot have options of the compiler.
    monkeypatch.delitem(COMPILER_OPTIONS, "cpu")
    sweep = make_sweep(CASES["optimizer"], mesh_of())
    jaxpr = jax.make_jaxpr(sweep.step)(sweep.state, [batches(0)[0]])
    base = jax.tree.leaves(random_params(CONFIG))
    kernels = {leaf.shape for leaf in base if leaf.ndim == 2}
    axes = [
        batched for shapes, batched in products(jaxpr.jaxpr) if kernels & set(shapes)
    ]
    assert len(axes) > 8
    assert set(axes) == {((), ())}


def test_the_base_is_not_copied():
    sweep = make_sweep(CASES["optimizer"], mesh_of())
    base = {name: x.shape for name, x in named(random_params(CONFIG)).items()}
    params = sweep.parameters(sweep.state, 0)
    found = {name: x.shape for name, x in named(params).items() if name in base}
    assert found == base


def test_adapters_with_other_targets_are_refused():
    case = [
        (LINEAR, LORA, 0, 0),
        (LINEAR, replace(LORA, target_modules=["o_proj"]), 0, 0),
    ]
    with pytest.raises(
        UsageError, match="adapters 1 and 2 of the sweep have different"
    ):
        make_sweep(case, mesh_of())


def test_the_states_that_were_stacked_do_not_stay_in_memory():
    mesh, runs, alive = mesh_of(), [], []
    for optim, lora, seed, _ in CASES["adapters"]:
        run = object.__new__(Run)
        _, state, frozen = start(optim, lora, seed, mesh)
        run.adapter = TrainedAdapter(optim, seed, 0.0, state, frozen)
        run.data = runs[0].data if runs else object()  # type: ignore[assignment]
        alive += map(weakref.ref, jax.tree.leaves((state.trainable, state.opt_state)))
        del state, frozen
        runs.append(run)
    assert all(leaf() is not None for leaf in alive)
    trainer = _make_trainer(runs, Llama(CONFIG), mesh, TrainConfig(), STEPS, True)
    gc.collect()
    assert all(leaf() is None for leaf in alive)
    one = trainer.adapter_state(trainer.state, 1)
    assert jax.tree.map(np.shape, one) == jax.tree.map(np.shape, runs[1].adapter.state)
