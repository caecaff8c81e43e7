from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_cases import (
    ALL_LINEAR,
    adapted_params,
    equations,
    llama_config,
    logits_of,
    ragged_batch,
    random_params,
    random_tokens,
)

from jlora.errors import UnsupportedError, UsageError
from jlora.lora.adapter_tree import join, split, trainable_mask
from jlora.model.decoding.kv_cache import KVCache
from jlora.model.llama import Llama
from jlora.ops.dropout import drop_by
from jlora.train.step import summed_loss

LENGTH = 24


@pytest.fixture(scope="module")
def config():
    return llama_config()


@pytest.fixture(scope="module")
def params(config):
    return random_params(config)


@pytest.fixture(scope="module")
def logits(config, params):
    model = Llama(config)

    @jax.jit
    def apply(tokens, segment_ids=None, positions=None):
        return model.apply(
            {"params": params}, tokens, segment_ids=segment_ids, positions=positions
        )

    return lambda *args, **kwargs: np.asarray(apply(*args, **kwargs))


@pytest.mark.parametrize("shape", [(0, 4), (1, 0)])
def test_no_tokens_are_a_usage_error(config, params, shape):
    with pytest.raises(UsageError, match=r"tokens: expected an array \[B, T\]"):
        Llama(config).apply({"params": params}, jnp.zeros(shape, jnp.int32))


def test_rows_beyond_the_attention_window_are_unsupported(config, params, logits):
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    windowed = Llama(replace(config, sliding_window=8))
    found = windowed.apply({"params": params}, tokens)
    np.testing.assert_array_equal(np.asarray(found), logits(tokens))
    with pytest.raises(UnsupportedError, match=r"row=9 exceeds .* sliding_window=8"):
        windowed.apply({"params": params}, jnp.zeros((1, 9), jnp.int32))


def test_a_token_changes_no_logits_before_it(logits):
    tokens = random_tokens(2, LENGTH)
    before = logits(tokens)
    after = logits(tokens.at[:, 9].add(1) % 56)
    np.testing.assert_array_equal(after[:, :9], before[:, :9])
    assert (after[:, 9:] != before[:, 9:]).any(-1).all()


def test_a_shift_of_all_positions_changes_nothing(logits):
    tokens = random_tokens(2, LENGTH)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    moved = logits(tokens, positions=positions + 200)
    # Angles near 224 radians have a float32 error of 1e-5.
    np.testing.assert_allclose(moved, logits(tokens), rtol=0, atol=2e-4)


def test_the_distance_of_positions_matters(logits):
    tokens = random_tokens(2, LENGTH)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    stretched = logits(tokens, positions=2 * positions)
    assert np.abs(stretched - logits(tokens))[:, 1:].max() > 1e-2


def packed_row(first, second):
    """Two documents and padding in one row of LENGTH tokens."""
    sizes = [len(first), len(second), LENGTH - len(first) - len(second)]
    tokens = np.concatenate([first, second, np.zeros(sizes[2], np.int32)])
    segment_ids = np.repeat(np.array([1, 2, 0], np.int32), sizes)
    positions = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
    return [jnp.asarray(x)[None] for x in (tokens, segment_ids, positions)]


DOCUMENTS = [np.asarray(random_tokens(1, n, seed=n))[0] for n in (9, 11)]


def test_documents_in_one_row_do_not_see_each_other(logits):
    first, second = DOCUMENTS
    before = logits(*packed_row(first, second))[0]
    other_first = logits(*packed_row((first + 1) % 56, second))[0]
    other_second = logits(*packed_row(first, (second + 1) % 56))[0]
    np.testing.assert_array_equal(other_first[9:20], before[9:20])
    np.testing.assert_array_equal(other_second[:9], before[:9])
    assert (other_first[:9] != before[:9]).any(-1).all()


def test_packed_documents_have_the_logits_they_have_alone(logits):
    packed = logits(*packed_row(*DOCUMENTS))[0]
    for document, found in zip(DOCUMENTS, (packed[:9], packed[9:20]), strict=True):
        # Sums over masked zeros come in another order: measured 2e-6.
        np.testing.assert_allclose(
            found, logits(jnp.asarray(document)[None])[0], rtol=0, atol=2e-5
        )


def test_padding_gives_finite_logits(logits):
    assert np.isfinite(logits(*packed_row(*DOCUMENTS))).all()


@pytest.mark.parametrize("wrong", [-1, 56, 2**31 - 1])
def test_an_id_outside_the_vocabulary_gives_nan(logits, wrong):
    found = logits(random_tokens(2, 5).at[0, 2].set(wrong))
    assert np.isnan(found[0, 2:]).all()
    assert np.isfinite(found[1]).all()


def decoder(config, params):
    @partial(jax.jit, static_argnames="is_prompt")
    def decode(part, cache, *counts, is_prompt=False):
        return Llama(config).apply(
            {"params": params},
            part,
            cache,
            jnp.asarray(counts, jnp.int32),
            is_prompt=is_prompt,
            method="decode",
        )

    return decode


@pytest.mark.parametrize("is_prompt", [False, True])
@pytest.mark.parametrize("padding", [0, 5])
def test_decoding_through_the_cache_equals_the_full_pass(
    config, params, logits, padding, is_prompt
):
    tokens, prompt = random_tokens(2, LENGTH), 9
    expected = logits(tokens)
    cache = KVCache.empty(config, 2, LENGTH + padding, jnp.float32)
    decode = decoder(config, params)
    padded = jnp.pad(tokens[:, :prompt], ((0, 0), (0, padding)), constant_values=7)
    found, cache = decode(padded, cache, prompt, prompt, is_prompt=is_prompt)
    results = [found]
    for t in range(prompt, LENGTH):
        found, cache = decode(tokens[:, t : t + 1], cache, 1, 1)
        results.append(found)
    assert cache.length.tolist() == [LENGTH] * 2
    np.testing.assert_allclose(
        np.stack(results, axis=1), expected[:, prompt - 1 :], rtol=0, atol=2e-5
    )


def test_a_prompt_may_come_in_parts(config, params, logits):
    tokens = random_tokens(1, 12)
    cache = KVCache.empty(config, 1, 16, jnp.float32)
    decode = decoder(config, params)
    _, cache = decode(tokens[:, :7], cache, 7)
    found, _ = decode(tokens[:, 7:], cache, 5)
    np.testing.assert_allclose(found, logits(tokens)[:, -1], rtol=0, atol=2e-5)


def test_rows_of_different_lengths_do_not_see_their_padding(config, params, logits):
    tokens, counts = random_tokens(2, 12), (4, 9)
    cache = KVCache.empty(config, 2, 16, jnp.float32)
    decode = decoder(config, params)
    _, cache = decode(tokens[:, :9], cache, *counts, is_prompt=True)
    following = jnp.stack([tokens[0, 4:6], tokens[1, 9:11]])
    _, cache = decode(following[:, :1], cache, 1, 1)
    found, cache = decode(following[:, 1:], cache, 1, 1)
    assert cache.length.tolist() == [6, 11]
    for row, (count, got) in enumerate(zip(counts, found, strict=True)):
        expected = logits(tokens[row : row + 1, : count + 2])[0, -1]
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def loss_of(config, remat, dropout=0.2, lora=ALL_LINEAR):
    model = Llama(config, remat=remat, lora_dropout=dropout)
    params = adapted_params(config, lora)
    trainable, frozen = split(params, trainable_mask(params))
    batch = jax.tree.map(jnp.asarray, ragged_batch(rows=4))

    def loss(trainable):
        return summed_loss(
            model,
            join(trainable, frozen),
            batch,
            packed=True,
            chunk=5,
            dropout_key=jax.random.key(0) if dropout else None,
        )

    return loss, trainable


@pytest.fixture(scope="module")
def plain_gradients():
    config = llama_config(num_hidden_layers=1)
    loss, trainable = loss_of(config, "none")
    return config, jax.jit(jax.grad(loss))(trainable)


@pytest.mark.parametrize("remat", ["minimal", "full", "offload"])
def test_remat_gives_the_same_gradients(plain_gradients, remat):
    config, expected = plain_gradients
    loss, trainable = loss_of(config, remat)
    found = jax.jit(jax.grad(loss))(trainable)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # The compiler fuses the recomputed parts differently: some units in the last
        # place of the largest terms.
        scale = np.abs(b).max()
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=2e-6)


def count_dots(config, remat, **options):
    loss, trainable = loss_of(config, remat, **options)
    return str(jax.make_jaxpr(jax.grad(loss))(trainable)).count("dot_general")


def test_remat_recomputes_what_it_says():
    config = llama_config(num_hidden_layers=1)
    none, minimal, full = (count_dots(config, r) for r in ("none", "minimal", "full"))
    # Minimal: both products of attention, and x A of each adapter. Full: these, and
    # of each linear but the last, whose output the backward pass does not read, x W and
    # (x A) B.
    assert minimal - none == 2 + 7
    assert full - none == 2 + 7 + 6 + 6


@pytest.mark.parametrize(("dropout", "again"), [(0.0, 2 + 7), (0.2, 2 + 7 + 7 + 2)])
def test_remat_minimal_keeps_the_products_that_dora_scales(dropout, again):
    config = llama_config(num_hidden_layers=1)
    lora = replace(ALL_LINEAR, use_dora=True)
    none, minimal = (
        count_dots(config, remat, dropout=dropout, lora=lora)
        for remat in ("none", "minimal")
    )
    # As without DoRA; under dropout also (x A) B, and gate's and up's second x W.
    assert minimal - none == again


def test_a_tied_head_is_the_embedding():
    config = llama_config(tie_word_embeddings=True)
    params, tokens = random_params(config), random_tokens(2, 6)
    model = Llama(config)
    hidden = logits_of(model, params, tokens, method="hidden_states")
    table = np.asarray(params["embed_tokens"]["embedding"])
    assert "lm_head" not in params
    expected = hidden @ table.T
    found = logits_of(model, params, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_logits_are_float32_whatever_the_compute_dtype(config, params):
    model = Llama(config, dtype=jnp.bfloat16)
    variables = {"params": params}
    found = jax.eval_shape(model.apply, variables, random_tokens(1, 5))
    assert found.dtype == jnp.float32


def test_bfloat16_compute_is_close_to_float32(config, params, logits):
    tokens = random_tokens(2, LENGTH)
    found = logits_of(Llama(config, dtype=jnp.bfloat16), params, tokens)
    expected = logits(tokens)
    # bfloat16 keeps 8 bits; two layers add a few of its roundings up.
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < 0.05


def masks_seeds(monkeypatch, config, key):
    """The seeds of every adapter's dropout in one pass, in their order."""
    found = []

    def record(x, seeds, rate):
        found.append(tuple(np.asarray(seeds).tolist()))
        return drop_by(x, seeds, rate)

    monkeypatch.setattr("jlora.lora.lora_dense.drop_by", record)
    model = Llama(config, lora_dropout=0.5)
    variables = {"params": adapted_params(config)}
    model.apply(variables, random_tokens(1, 4), rngs={"dropout": key})
    return found


def test_every_adapter_of_every_layer_has_a_mask_of_its_own(monkeypatch, config):
    first = masks_seeds(monkeypatch, config, jax.random.key(0))
    assert len(set(first)) == 7 * config.num_hidden_layers
    assert masks_seeds(monkeypatch, config, jax.random.key(0)) == first
    assert not set(masks_seeds(monkeypatch, config, jax.random.key(1))) & set(first)


def test_all_seeds_are_drawn_at_once(config):
    model = Llama(config, lora_dropout=0.5)
    params, tokens = adapted_params(config), random_tokens(1, 4)

    def apply(key):
        return model.apply({"params": params}, tokens, rngs={"dropout": key})

    found = [
        e.primitive.name
        for e in equations(jax.make_jaxpr(apply)(jax.random.key(0)).jaxpr)
    ]
    assert found.count("random_bits") == 1
