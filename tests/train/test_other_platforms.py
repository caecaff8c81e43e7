"""A step is made for the devices of a mesh, not for those of this machine."""

from typing import Any

import jax.numpy as jnp
import pytest
from helpers.fake_devices import mesh_of
from helpers.training_cases import Run, adapted_params, llama_config, ragged_batch

from jlora.config.run_config import ComputeConfig
from jlora.model.llama import Llama
from jlora.ops.compute_choices import choose_compute
from jlora.train.step import make_train_step

# Sizes that the Hopper kernels take.
WIDE = llama_config(
    num_hidden_layers=1,
    hidden_size=256,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,
)
KERNELS = {"mosaic_gpu", "tpu_custom_call"}


@pytest.mark.parametrize(
    ("platform", "lowered_for", "attention", "kernels"),
    [
        ("cpu", "cpu", "auto", set()),
        ("gpu", "cuda", "xla", {"mosaic_gpu"}),
        ("tpu", "tpu", "splash", {"tpu_custom_call"}),
    ],
)
def test_a_step_contains_the_kernels_of_its_platform(
    platform: str, lowered_for: str, attention: Any, kernels: set[str]
) -> None:
    described = mesh_of(platform, capability="9.0")
    wanted = ComputeConfig(dtype="bfloat16", attention=attention)
    compute = choose_compute(wanted, described, head_dim=WIDE.head_dim)
    run = Run(config=WIDE, params=adapted_params(WIDE, dtype=jnp.bfloat16))
    step = make_train_step(
        Llama.with_compute(WIDE, compute),
        run.optimizer,
        run.mesh,
        state=run.state,
        frozen=run.frozen,
    )
    traced = step.trace(run.state, run.frozen, ragged_batch(rows=2, length=256))
    text = traced.lower(lowering_platforms=(lowered_for,)).as_text()
    assert {name for name in KERNELS if name in text} == kernels
