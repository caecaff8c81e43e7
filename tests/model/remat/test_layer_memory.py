from typing import Any

import jax
import numpy as np
import pytest
from helpers.training_cases import (
    ALL_LINEAR,
    Run,
    adapted_params,
    equations,
    llama_config,
    ragged_batch,
)

from jlora.config.lora_config import LoraConfig
from jlora.model.remat import layer_memory
from jlora.model.remat.layer_memory import num_pieces

CONFIG = llama_config(num_hidden_layers=2, hidden_size=64)
ADAPTERS = {
    "lora": ALL_LINEAR,
    "dora": LoraConfig(r=2, target_modules="all-linear", use_dora=True),
    "norms": LoraConfig(r=2, modules_to_save=["post_attention_layernorm"]),
}


def gradients(
    monkeypatch: pytest.MonkeyPatch, tokens: int, adapter: str, **settings: Any
) -> tuple[Any, Any]:
    size = tokens * CONFIG.intermediate_size
    monkeypatch.setattr(layer_memory, "_PIECE_SIZE", size)
    monkeypatch.setattr(layer_memory, "_ROWS", 8)
    run = Run(
        config=CONFIG, params=adapted_params(CONFIG, ADAPTERS[adapter]), **settings
    )
    state, metrics = run.step(run.state, run.frozen, ragged_batch(rows=8, length=32))
    return metrics, state.trainable


@pytest.mark.parametrize("remat", ["full", "offload"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_mlp_in_pieces_gives_the_same_step(monkeypatch, adapter, remat):
    whole = gradients(monkeypatch, 8 * 32, adapter, remat=remat)
    pieces = gradients(monkeypatch, 64, adapter, remat=remat)
    jax.tree.map(
        # The sums over positions are in another order.
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6),
        whole,
        pieces,
    )


@pytest.mark.parametrize(
    ("rows", "length", "pieces"),
    [
        (2, 4096, 2),
        (1, 4096, 2),
        (1, 32768, 8),
        (1, 256, 1),  # a piece would not suit the fused kernels
        (1, 512, 2),
        (3, 512, 2),
        (2, 1000, 2),  # no multiple of 256 anyway
        (1, 1001, 1),  # no piece of a useful size divides it
    ],
)
def test_pieces_of_the_mlp_are_equal_and_suit_the_kernels(rows, length, pieces):
    assert num_pieces(rows, length, 14336) == pieces


@pytest.mark.parametrize("remat", ["none", "minimal", "full"])
def test_the_gradients_of_a_layer_are_tied_together(remat):
    config = llama_config(num_hidden_layers=3)
    run = Run(config=config, params=adapted_params(config), remat=remat)
    batch = ragged_batch(rows=2)
    jaxpr = run.step.trace(run.state, run.frozen, batch).jaxpr.jaxpr
    tied = {
        len(equation.invars)
        for equation in equations(jaxpr)
        if equation.primitive.name == "optimization_barrier"
    }
    # A and B of seven projections, and the input.
    assert 2 * 7 + 1 in tied
