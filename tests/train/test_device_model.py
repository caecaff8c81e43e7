"""Steps that loop over layers, as on a TPU, train as steps with one layer after the other."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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

from jlora.config.run_config import MeshConfig
from jlora.formats.digests import flatten
from jlora.lora.adapter_tree import join
from jlora.model.llama import Llama
from jlora.model.remat.layer_runs import unstacked
from jlora.train import device_model
from jlora.train.device_model import frozen_for_steps
from jlora.train.evaluation import make_eval_step
from jlora.train.step import make_train_step
from jlora.train.sweep import make_sweep_trainer
from jlora.train.trainer import TrainedAdapter

CONFIG = llama_config(num_hidden_layers=2)
# Sizes of which every device has whole blocks of nf4.
BLOCKS = llama_config(
    num_hidden_layers=2, hidden_size=128, intermediate_size=128, head_dim=8
)


@pytest.fixture
def loops(monkeypatch):
    """Makes steps on CPUs loop, as those on TPUs do."""
    monkeypatch.setattr(device_model, "LOOPING_PLATFORMS", ("cpu",))


def with_loop(run: Run, **settings) -> Run:
    """Returns the run, its step with a loop."""
    run = copy.copy(run)
    run.frozen = frozen_for_steps(run.state.trainable, run.frozen, run.mesh)
    run.step = make_train_step(
        run.model,
        run.optimizer,
        run.mesh,
        state=run.state,
        frozen=run.frozen,
        **settings,
    )
    return run


def assert_trains_alike(looped: Run, other: Run) -> None:
    first, second = looped.train(2), other.train(2)
    for ours, theirs in zip(first, second, strict=True):
        # Sums in another order: 1.1e-6 seen, of a norm.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours == pytest.approx(theirs, rel=3e-6)
    expected = flatten(other.state.trainable)
    for name, leaf in flatten(looped.state.trainable).items():
        # Adam divides by gradients that are nearly zero: 2e-6 seen, of steps of 1e-2.
        np.testing.assert_allclose(
            leaf, expected[name], rtol=0, atol=1e-5, err_msg=name
        )


DORA = replace(ALL_LINEAR, use_dora=True)
CASES = {
    "none, accumulated": {"grad_accum_steps": 2},
    "minimal, dropout": {"remat": "minimal", "lora_dropout": 0.3},
    "offload": {"remat": "offload"},
    "every axis, full": {"mesh": MeshConfig(2, 2, 2), "remat": "full"},
    "dora, tensor": {"mesh": MeshConfig(1, 2, 2), "lora": DORA},
    "nf4, fsdp": {"config": BLOCKS, "mesh": MeshConfig(1, 2), "remat": "minimal"},
    "pissa, norms": {
        "lora": replace(
            ALL_LINEAR, init_lora_weights="pissa", modules_to_save=["input_layernorm"]
        )
    },
    "embedding, head": {
        "lora": replace(
            ALL_LINEAR, target_modules=["embed_tokens", "v_proj", "lm_head"]
        )
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_loop_over_layers_trains_as_one_layer_after_the_other(case, loops):
    settings = {"config": CONFIG, "lora": ALL_LINEAR} | CASES[case]
    params = adapted_params(settings["config"], settings.pop("lora"))
    params = quantized(params) if "nf4" in case else params
    run = Run(settings.pop("mesh", MeshConfig(1)), params=params, **settings)
    parts = settings.get("grad_accum_steps", 1)
    looped = with_loop(run, grad_accum_steps=parts)
    assert set(looped.frozen["layers"]) == {"0-1"}
    run.state, looped.state = (jax.tree.map(jnp.copy, run.state) for _ in range(2))
    assert_trains_alike(looped, run)


def test_the_program_does_not_grow_with_depth(loops):
    found = []
    for layers in (2, 5):
        run = with_loop(Run(config=llama_config(num_hidden_layers=layers)))
        jaxpr = run.step.trace(run.state, run.frozen, ragged_batch()).jaxpr.jaxpr
        names = [e.primitive.name for e in equations(jaxpr)]
        found.append(names.count("dot_general"))
    assert found[0] == found[1] > 0


def saved_shapes(run: Run) -> set[tuple[int, ...]]:
    """The shapes of what a loop over layers keeps of each for the backward pass."""
    jaxpr = run.step.trace(run.state, run.frozen, ragged_batch()).jaxpr.jaxpr
    scans = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
    (forward,) = [
        e for e in scans if e.params["length"] == 2 and not e.params["reverse"]
    ]
    kept = forward.outvars[forward.params["num_carry"] :]
    return {x.aval.shape[1:] for x in kept}


@pytest.mark.parametrize("remat", ["none", "minimal", "full"])
def test_no_weights_and_nothing_shared_is_kept_for_each_layer(remat, loops):
    run = Run(MeshConfig(1, 2), config=CONFIG, remat=remat)
    looped = with_loop(run)
    kept = saved_shapes(looped)
    leaves = jax.tree.leaves(run.frozen["layers"]["0"])
    weights = {x.shape for x in leaves if x.ndim == 2}
    rows = ragged_batch()["tokens"].shape[0] // 2
    angles = (rows, 10, 1, CONFIG.head_dim // 2)
    assert not kept & (weights | {angles, (rows, 10)})
    assert (rows, 10, CONFIG.hidden_size) in kept
    assert remat != "full" or len(kept) == 1


def test_layers_that_differ_are_several_runs(loops, recwarn):
    lora = replace(ALL_LINEAR, rank_pattern={r"layers\.1\.mlp\.gate_proj": 3})
    config = llama_config(num_hidden_layers=4)
    run = Run(config=config, params=adapted_params(config, lora))
    looped = with_loop(run)
    assert set(looped.frozen["layers"]) == {"0-0", "1-1", "2-3"}
    run.state, looped.state = (jax.tree.map(jnp.copy, run.state) for _ in range(2))
    assert_trains_alike(looped, run)


def test_layers_are_the_same_again_after_the_loop(loops):
    run = Run(config=CONFIG)
    frozen = frozen_for_steps(run.state.trainable, run.frozen, run.mesh)
    assert set(frozen["layers"]) == {"0-1"}
    whole = flatten(unstacked(join(run.state.trainable, frozen)))
    expected = flatten(join(run.state.trainable, run.frozen))
    assert whole.keys() == expected.keys()
    for name, leaf in whole.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)


def test_elsewhere_nothing_is_stacked():
    run = Run(config=CONFIG)
    assert frozen_for_steps(run.state.trainable, run.frozen, run.mesh) is run.frozen


def adapters(seeds=(0, 1)) -> list[TrainedAdapter]:
    base = adapted_params(CONFIG)
    mesh = Run(config=CONFIG).mesh
    return [
        TrainedAdapter.create(base, ADAM, mesh, seed=seed, lora_dropout=0.2 * seed)
        for seed in seeds
    ]


def test_a_sweep_and_its_evaluation_loop_as_well(monkeypatch):
    mesh, found = Run(config=CONFIG).mesh, []
    for platforms in ((), ("cpu",)):
        monkeypatch.setattr(device_model, "LOOPING_PLATFORMS", platforms)
        sweep = make_sweep_trainer(
            adapters(), Llama(CONFIG), mesh, total_steps=2, orders=[0, 0]
        )
        state, metrics = sweep.step(sweep.state, [ragged_batch()])
        params = sweep.parameters(state, 1)
        step = make_eval_step(Llama(CONFIG), mesh, params=params)
        found.append(
            [*metrics["loss"], *metrics["grad_norm"], step(params, ragged_batch())[0]]
        )
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
