"""Devices that have some tokens of each row, against one that has whole rows."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_cases import (
    ALL_LINEAR,
    Run,
    adapted_params,
    llama_config,
    ragged_batch,
)

from jlora.config.run_config import MeshConfig
from jlora.errors import UnsupportedError, UsageError
from jlora.ops.attention import attend
from jlora.ops.compute_choices import Compute
from jlora.ops.dropout import axis_codes, placed, seeds
from jlora.parallel.context import heads_of_rows, tokens_of_heads, whole_rows
from jlora.parallel.sharding import TOKEN_SPEC, make_mesh

ROWS, LENGTH, DIM = 2, 12, 4
MESH = MeshConfig(1, 1, 1, 4)


def normal(number, *shape):
    return jax.random.normal(jax.random.key(number), shape)


@pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [
        (8, 4),
        (8, 2),  # two devices share a key-value head
        (4, 1),
        (12, 6),  # a device has parts of two groups of queries
    ],
)
def test_attention_and_its_gradient_are_those_of_whole_rows(heads, kv_heads):
    segment_ids = jnp.asarray(ragged_batch(rows=ROWS, length=LENGTH)["segment_ids"])
    q = normal(0, ROWS, LENGTH, heads, DIM)
    k, v = (normal(i, ROWS, LENGTH, kv_heads, DIM) for i in (1, 2))
    d_out = normal(3, *q.shape)

    def split(q, k, v, segment_ids, d_out):
        def own(q, k, v):
            q, k, v = map(heads_of_rows, (q, k, v))
            out = attend(q, k, v, Compute(), segment_ids=whole_rows(segment_ids))
            return tokens_of_heads(out)

        out, pull = jax.vjp(own, q, k, v)
        return out, pull(d_out)

    def whole(q, k, v, segment_ids, d_out):
        out, pull = jax.vjp(
            lambda *x: attend(x[0], x[1], x[2], Compute(), segment_ids=segment_ids),
            *(q, k, v),
        )
        return out, pull(d_out)

    mapped = jax.shard_map(
        split,
        mesh=make_mesh(MESH),
        in_specs=TOKEN_SPEC,
        out_specs=TOKEN_SPEC,
        check_vma=False,
    )
    found = jax.jit(mapped)(q, k, v, segment_ids, d_out)
    expected = jax.jit(whole)(q, k, v, segment_ids, d_out)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6),
        found,
        expected,
    )


def test_the_codes_of_tokens_are_those_of_whole_rows():
    words = seeds(jax.random.key(0))

    def own(x):
        size = x.shape[0] * x.shape[1]
        (rows,), _ = axis_codes([placed(words, x)], (size, DIM))
        return rows.reshape(x.shape[:2])

    mapped = jax.shard_map(
        own,
        mesh=make_mesh(MeshConfig(2, 1, 1, 4)),
        in_specs=TOKEN_SPEC,
        out_specs=TOKEN_SPEC,
        check_vma=False,
    )
    found = jax.jit(mapped)(jnp.zeros((4, LENGTH, DIM)))
    (whole,), _ = axis_codes([words], (4 * LENGTH, DIM))
    np.testing.assert_array_equal(found, whole.reshape(4, LENGTH))


DYNAMIC = {"max_position_embeddings": 8}
DYNAMIC |= {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}


@pytest.mark.parametrize(
    ("changes", "use_dora", "mesh"),
    [
        (DYNAMIC, False, MESH),  # angles depend on the length of the whole row
        ({}, True, MeshConfig(1, 2, 1, 2)),
    ],
)
def test_a_model_trains_as_on_one_device(changes, use_dora, mesh):
    config = llama_config(num_hidden_layers=1, **changes)
    params = adapted_params(config, replace(ALL_LINEAR, use_dora=use_dora))
    found, expected = (
        Run(sizes, config=config, params=params).train(2, length=16)
        for sizes in (mesh, MeshConfig(1))
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_the_window_is_that_of_whole_rows():
    config = llama_config(num_hidden_layers=1, model_type="mistral", sliding_window=8)
    run = Run(MESH, config=config, params=adapted_params(config))
    run.train(1, length=8)
    with pytest.raises(UnsupportedError, match="tokens in a row=16 exceeds"):
        run.train(1, length=16)


def test_layers_that_the_compiler_splits_are_refused():
    params = adapted_params(llama_config(num_hidden_layers=1, attention_bias=True))
    with pytest.raises(UsageError, match=r"mesh.context=2 with mesh.tensor=2 takes"):
        Run(MeshConfig(1, 1, 2, 2), params=params).train(1)
