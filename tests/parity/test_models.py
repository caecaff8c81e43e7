import jax
import jax.numpy as jnp
import llamas
import numpy as np
import pytest
import torch

import convert


def jax_logits(path, tokens, **options):
    model, params = convert.load(str(path), **options)
    return np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(tokens)))


@pytest.mark.parametrize("name", llamas.CONFIGS)
def test_logits_equal_transformers(name, tmp_path):
    theirs = llamas.save(tmp_path, name)
    tokens = llamas.random_tokens()
    np.testing.assert_allclose(
        jax_logits(tmp_path, tokens),
        llamas.torch_logits(theirs, tokens),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_half_precision_checkpoint_equal_transformers(dtype, tmp_path):
    theirs = llamas.save(tmp_path, "gqa", dtype)
    tokens = llamas.random_tokens()
    np.testing.assert_allclose(
        jax_logits(tmp_path, tokens),
        llamas.torch_logits(theirs, tokens),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("name", ["mha", "tied"])
def test_logits_of_a_sharded_checkpoint_equal_transformers(name, tmp_path):
    theirs = llamas.save(tmp_path, name, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens = llamas.random_tokens()
    np.testing.assert_allclose(
        jax_logits(tmp_path, tokens),
        llamas.torch_logits(theirs, tokens),
        rtol=0,
        atol=1e-4,
    )
