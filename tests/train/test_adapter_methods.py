import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.adapter_methods import METHODS, trained_adapter
from helpers.training_cases import Run, ragged_batch

from jlora.config.run_config import MeshConfig
from jlora.lora.adapter_tree import join, split, trainable_mask
from jlora.model.llama import Llama
from jlora.train.checkpoint import load_newest, restore_into, save_checkpoint
from jlora.train.step import summed_loss


def device_batch():
    return jax.tree.map(jnp.asarray, ragged_batch())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_under_the_chunked_loss_are_those_of_whole_logits(method):
    config, params, _ = trained_adapter(method)
    model, batch = Llama(config), device_batch()
    trainable, frozen = split(params, trainable_mask(params))

    def whole(trainable):
        logits: Any = model.apply(
            {"params": join(trainable, frozen)},
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["targets"]
        )
        return jnp.sum(losses * batch["loss_mask"])

    def chunked(trainable):
        params = join(trainable, frozen)
        return summed_loss(model, params, batch, packed=True, chunk=4)

    value, expected = jax.jit(jax.value_and_grad(whole))(trainable)
    found, gradients = jax.jit(jax.value_and_grad(chunked))(trainable)
    assert float(found) == pytest.approx(float(value), rel=1e-6)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        other = expected
        for entry in path:
            other = other[entry.key]
        assert np.abs(other).max() > 0, path
        limit = 1e-5 * np.abs(other).max()
        np.testing.assert_allclose(gradient, other, atol=limit, err_msg=str(path))


@pytest.mark.parametrize("method", ["dora", "lora, shared", "tokens", "saved"])
def test_eight_devices_train_as_one_does(method):
    config, params, _ = trained_adapter(method)
    one = Run(config=config, params=params).train(2)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    many = Run(mesh, config=config, params=params)
    losses = [metrics["loss"] for metrics in many.train(2)]
    assert losses == pytest.approx([metrics["loss"] for metrics in one], abs=2e-6)
    assert not math.isclose(losses[0], losses[1], rel_tol=1e-4)


@pytest.mark.parametrize("method", ["dora", "saved"])
def test_the_head_has_dropout_in_training_as_every_adapter_has(method):
    config, params, _ = trained_adapter(method)
    model, batch = Llama(config, lora_dropout=0.5), device_batch()

    def loss(key):
        return float(
            summed_loss(model, params, batch, packed=True, chunk=4, dropout_key=key)
        )

    assert loss(jax.random.key(1)) != loss(jax.random.key(2))
    assert loss(jax.random.key(1)) == loss(jax.random.key(1))


@pytest.mark.parametrize("method", ["dora, tied", "saved, shared", "tokens"])
def test_every_kind_of_leaf_is_saved_and_restored(method, tmp_path):
    config, params, _ = trained_adapter(method)
    run = Run(config=config, params=params)
    save_checkpoint(tmp_path, 1, run.state, {"settings": {}}, keep=1)
    saved, _ = load_newest(tmp_path)
    assert saved is not None
    fresh = Run(config=config, params=jax.tree.map(jnp.zeros_like, params))
    state = restore_into(fresh.state, saved)
    jax.tree.map(np.testing.assert_array_equal, state, run.state)
