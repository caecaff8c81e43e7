"""Packed rows train as the same documents alone would: loss, gradient, isolation."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.data_cases import dataset_of
from helpers.training_cases import CONFIG, adapted_params, llama_config

from jlora.data.tokenize.tokenize_rows import Example
from jlora.lora.adapter_tree import join, split, trainable_mask
from jlora.model.llama import Llama
from jlora.train.step import summed_loss

SEQ_LEN = 64


def documents(count: int = 20) -> list[Example]:
    rng = np.random.default_rng(0)
    examples = []
    for line, length in enumerate(rng.integers(3, SEQ_LEN // 2, count)):
        tokens = rng.integers(0, CONFIG["vocab_size"], length).astype(np.int32)
        mask = (rng.random(length) < 0.6).astype(np.uint8)
        mask[0] = 0
        examples.append(Example(Path("a"), line, tokens, mask))
    return examples


@cache
def model_and_params():
    config = llama_config()
    return Llama(config), adapted_params(config)


def loss_and_gradient(*, packing: bool):
    """The mean loss over all supervised tokens of an epoch, and its gradient."""
    model, params = model_and_params()
    trainable, frozen = split(params, trainable_mask(params))
    data = dataset_of(documents(), packing=packing)

    @jax.jit
    def one(trainable, batch):
        return jax.value_and_grad(
            lambda t: summed_loss(
                model, join(t, frozen), batch, packed=packing, chunk=16
            )
        )(trainable)

    batches = [data.batch(i) for i in range(data.steps_per_epoch)]
    parts = [one(trainable, batch) for batch in batches]
    total = jax.tree.map(lambda *x: sum(x) / data.num_supervised, *parts)
    return total, len(batches)


def test_packed_loss_and_gradients_equal_unpacked_ones():
    (packed, gradient), few = loss_and_gradient(packing=True)
    (alone, expected), many = loss_and_gradient(packing=False)
    assert few < many
    assert float(packed) == pytest.approx(float(alone), rel=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for found, wanted in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True
    ):
        # Float32 sums over rows of another length: 1e-6 of the largest gradient.
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * max(1, largest))


def test_first_label_of_every_document_is_masked():
    data = dataset_of(documents())
    for step in range(data.steps_per_epoch):
        batch = data.batch(step)
        # The target at t is the token at t + 1: of a document's first token, none.
        first = np.pad(batch["positions"][:, 1:], ((0, 0), (0, 1))) == 0
        assert not batch["loss_mask"][first].any()


def test_changing_one_document_leaves_the_logits_of_the_others_bit_identical():
    model, params = model_and_params()
    examples = documents()
    before = dataset_of(examples)
    changed = next(e for e in examples if len(e.tokens) > 10)
    other = (changed.tokens + 1) % CONFIG["vocab_size"]
    examples[changed.number] = replace(changed, tokens=other)
    after = dataset_of(examples)

    @jax.jit
    def logits(batch):
        return model.apply(
            {"params": params},
            batch["tokens"],
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
        )

    differing = 0
    for step in range(before.steps_per_epoch):
        old, new = before.batch(step), after.batch(step)
        segments = old["segment_ids"]
        touched = np.zeros(segments.shape, bool)
        for row, segment in np.argwhere(old["tokens"] != new["tokens"]):
            touched[row] |= segments[row] == segments[row, segment]
        one, two = np.asarray(logits(old)), np.asarray(logits(new))
        np.testing.assert_array_equal(one[~touched], two[~touched])
        differing += int((one[touched] != two[touched]).any(-1).sum())
    assert differing == len(changed.tokens)
