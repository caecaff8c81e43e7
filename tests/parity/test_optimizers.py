"""Adafactor on LoRA's matrices, beside that of Transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from helpers.training_cases import adapted_params, llama_config
from transformers.optimization import Adafactor

from jlora.config.optim_config import OptimConfig
from jlora.lora.adapter_tree import split, trainable_mask
from jlora.train.optimizer import make_optimizer, make_schedule

STEPS, RATE, DECAY = 6, 1e-2, 0.1


def test_adafactor_equals_that_of_transformers():
    params = adapted_params(llama_config(num_hidden_layers=1))
    config = OptimConfig(
        optimizer="adafactor",
        learning_rate=RATE,
        lr_schedule="constant",
        warmup_ratio=0,
        weight_decay=DECAY,
        max_grad_norm=0,
    )
    optimizer = make_optimizer(config, make_schedule(config, STEPS))
    state = optimizer.init(params)
    mask = trainable_mask(params)
    theirs = [
        torch.nn.Parameter(torch.tensor(np.asarray(leaf)))
        for leaf in jax.tree.leaves(split(params, mask)[0])
    ]
    other = Adafactor(
        theirs,
        lr=RATE,
        weight_decay=DECAY,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        gradients = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params
        )
        updates, state = optimizer.update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        own = jax.tree.leaves(split(gradients, mask)[0])
        for parameter, gradient in zip(theirs, own, strict=True):
            parameter.grad = torch.tensor(np.asarray(gradient))
        other.step()
    found = jax.tree.leaves(split(params, mask)[0])
    for leaf, parameter in zip(found, theirs, strict=True):
        expected = parameter.detach().numpy()
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-6)
