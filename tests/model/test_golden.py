from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN

import convert
from jlora.lora.adapter_tree import join, module_at, split, trainable_mask, with_adapter
from jlora.train.step import summed_loss

# Made by tests/golden/make_hf_golden.py with Transformers and PEFT.
GOLDEN = GOLDEN / "hf"


class Case(NamedTuple):
    model: Any
    base: dict[str, Any]
    adapted: dict[str, Any]
    expected: dict[str, np.ndarray]

    @property
    def batch(self):
        tokens, mask = self.expected["tokens"], np.float32(self.expected["mask"])
        # HF's mask belongs to the predicted token, ours to the predicting position.
        mask = np.roll(mask, -1, axis=1)
        mask[:, -1] = 0
        arrays = {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, axis=1),
            "loss_mask": mask,
            "segment_ids": np.ones_like(tokens),
            "positions": np.arange(tokens.shape[1], dtype=np.int32) + 0 * tokens,
        }
        return {key: jnp.asarray(value) for key, value in arrays.items()}

    def loss(self, params, *, packed=False, chunk=7):
        batch = self.batch
        total = summed_loss(self.model, params, batch, packed=packed, chunk=chunk)
        return total / batch["loss_mask"].sum()


@pytest.fixture(scope="module", params=["mha", "gqa", "llama3", "tied"])
def case(request):
    folder = GOLDEN / request.param
    with np.load(folder / "expected.npz") as file:
        expected = dict(file)
    model, base = convert.load(str(folder))
    leaves: dict[str, dict[str, Any]] = {}
    for key, value in expected.items():
        if key.startswith("model.layers") and ".lora_" in key:
            module, leaf, _ = key.rsplit(".", 2)
            pair = leaves.setdefault(module, {"lora_scaling": expected["scaling"]})
            pair[leaf] = value.T
    leaves = jax.tree.map(jnp.asarray, leaves)
    return Case(model, base, with_adapter(base, leaves), expected)


def test_logits_equal_transformers(case):
    logits = case.model.apply({"params": case.base}, case.batch["tokens"])
    expected = case.expected["base_logits"]
    # Both sum in float32, in another order: measured 1e-5 at most.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_logits_with_an_adapter_equal_peft(case):
    logits = case.model.apply({"params": case.adapted}, case.batch["tokens"])
    np.testing.assert_allclose(logits, case.expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("packed", "chunk"), [(False, 1), (False, 1000), (True, 7)])
def test_loss_equals_transformers(case, packed, chunk):
    loss = case.loss(case.base, packed=packed, chunk=chunk)
    assert float(loss) == pytest.approx(float(case.expected["base_loss"]), abs=1e-5)


def test_gradients_of_the_adapter_equal_peft(case):
    trainable, frozen = split(case.adapted, trainable_mask(case.adapted))
    gradients = jax.jit(jax.grad(lambda tree: case.loss(join(tree, frozen))))(trainable)
    prefix = "gradient of "
    keys = [key for key in case.expected if key.startswith(prefix)]
    assert len(keys) == len(jax.tree.leaves(gradients)) == 8
    for key in keys:
        module, leaf, _ = key.removeprefix(prefix).rsplit(".", 2)
        found = np.asarray(module_at(gradients, module)[leaf]).T
        largest = np.abs(case.expected[key]).max()
        np.testing.assert_allclose(
            found / largest, case.expected[key] / largest, rtol=0, atol=1e-4
        )
