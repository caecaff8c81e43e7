import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference

from jlora.config.llama_config import LlamaConfig
from jlora.formats.tensor_names import all_names
from jlora.lora.adapter_tree import join, module_at, split, trainable_mask, with_adapter
from jlora.model.decoder_layer import RMSNorm
from jlora.model.llama import Llama
from jlora.model.loss import cross_entropy
from jlora.model.rotary import rope_angles
from jlora.ops.compute_choices import Compute
from jlora.train.step import summed_loss

PLAIN = {
    "model_type": "llama",
    "vocab_size": 53,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "llama3": {"rope_parameters": LLAMA3, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 24, "num_key_value_heads": 2},
}


def random_weights(config, seed=0):
    rng = np.random.default_rng(seed)
    result = {}
    for name in all_names(LlamaConfig.from_hf(config)):
        array = rng.standard_normal(name.hf_shape) * 0.15
        result[name.key] = (array + name.key.endswith("norm.weight")).astype(np.float32)
    return result


def to_params(config, weights, adapters=None):
    params = {}
    for name in all_names(LlamaConfig.from_hf(config)):
        node = params
        *parents, leaf = name.path.split("/")
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = jnp.asarray(name.to_params(weights[name.key]))
    leaves = {
        module: {
            "lora_A": jnp.asarray(a),
            "lora_B": jnp.asarray(b),
            "lora_scaling": jnp.float32(scaling),
        }
        for module, (a, b, scaling) in (adapters or {}).items()
    }
    return with_adapter(params, leaves)


def random_adapters(config, weights, rank=3, seed=1):
    rng = np.random.default_rng(seed)
    result = {}
    for key, weight in weights.items():
        if "_proj.weight" in key:
            out_features, in_features = weight.shape
            a = rng.standard_normal((in_features, rank)).astype(np.float32) * 0.1
            b = rng.standard_normal((rank, out_features)).astype(np.float32) * 0.1
            result[key.removesuffix(".weight")] = (a, b, 1.7)
    return result


def random_tokens(config, batch=2, length=40, seed=2):
    rng = np.random.default_rng(seed)
    return rng.integers(0, config["vocab_size"], (batch, length)).astype(np.int32)


@pytest.fixture(params=CONFIGS)
def config(request):
    return PLAIN | CONFIGS[request.param]


def test_logits_equal_the_reference(config):
    weights, tokens = random_weights(config), random_tokens(config)
    model = Llama(LlamaConfig.from_hf(config))
    params = to_params(config, weights)
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens))
    expected = reference.forward(config, weights, tokens)
    # float32 against float64: measured 1e-5 at most.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_logits_with_adapters_on_every_linear_equal_the_reference(config):
    weights, tokens = random_weights(config), random_tokens(config)
    adapters = random_adapters(config, weights)
    model = Llama(LlamaConfig.from_hf(config))
    params = to_params(config, weights, adapters)
    expected = reference.forward(config, weights, tokens, adapters)
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_the_reference_sees_the_adapters():
    weights, tokens = random_weights(PLAIN), random_tokens(PLAIN)
    base = reference.forward(PLAIN, weights, tokens)
    adapters = random_adapters(PLAIN, weights)
    adapted = reference.forward(PLAIN, weights, tokens, adapters)
    assert np.abs(adapted - base).max() > 0.1


@pytest.mark.parametrize("rope", ["mha", "llama3", "wide_heads"])
def test_rotary_angles_equal_the_reference(rope):
    config = PLAIN | CONFIGS[rope]
    positions = np.array([[0, 1, 2, 17, 127]], np.int32)
    cos, sin = rope_angles(
        LlamaConfig.from_hf(config), jnp.asarray(positions), 128, "cpu"
    )
    angles = positions[:, :, None, None] * reference.rope_frequencies(config)
    # One unit in the last place of a float32 frequency is 1e-5 radians at position 127.
    np.testing.assert_allclose(cos, np.cos(angles), rtol=0, atol=2e-5)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=0, atol=2e-5)


def test_llama3_frequencies_cover_kept_blended_and_divided_ones():
    config = PLAIN | CONFIGS["llama3"]
    plain = {"rope_type": "default", "rope_theta": 500000.0}
    scaled = reference.rope_frequencies(config)
    ratio = reference.rope_frequencies(PLAIN | {"rope_parameters": plain}) / scaled
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(8)
    assert ((ratio > 1.01) & (ratio < 7.99)).any()


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_rms_norm_equals_the_reference(size):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((5, 32)) * size).astype(np.float32)
    scale = rng.standard_normal(32).astype(np.float32)
    norm = RMSNorm(1e-5).apply({"params": {"scale": scale}}, jnp.asarray(x))
    expected = reference.rms_norm(x.astype(np.float64), scale, 1e-5)
    np.testing.assert_allclose(np.asarray(norm), expected, rtol=1e-5)


def head_case(kind, seed=4):
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((23, 8)).astype(np.float32)
    head = {"embedding": table} if kind == "tied" else {"kernel": table.T}
    if kind == "adapter":
        a = rng.standard_normal((8, 3)).astype(np.float32)
        b = rng.standard_normal((3, 23)).astype(np.float32)
        head |= {"lora_A": a, "lora_B": b, "lora_scaling": np.float32(0.5)}
        table = table + 0.5 * (np.float64(a) @ b).T
    hidden = rng.standard_normal((2, 7, 8)).astype(np.float32)
    targets = rng.integers(0, 23, (2, 7)).astype(np.int32)
    mask = (rng.random((2, 7)) < 0.7).astype(np.float32)
    expected = reference_loss(table, targets, mask)
    return jax.tree.map(jnp.asarray, (hidden, head, targets, mask)), expected


def reference_loss(table, targets, mask):
    def loss(hidden):
        return reference.loss(hidden @ table.T.astype(np.float64), targets, mask)

    return loss


def difference_quotients(function, x, step=1e-5):
    result = np.empty_like(x)
    for index in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[index] += step
        low[index] -= step
        result[index] = (function(high) - function(low)) / (2 * step)
    return result


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("kind", ["untied", "tied", "adapter"])
def test_chunked_loss_equals_the_reference(kind, chunk):
    (hidden, head, targets, mask), expected = head_case(kind)
    loss = cross_entropy(hidden, head, targets, mask, Compute(), chunk=chunk)
    loss /= mask.sum()
    assert float(loss) == pytest.approx(expected(np.float64(hidden)), rel=1e-6)


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("kind", ["untied", "tied", "adapter"])
def test_gradient_of_the_chunked_loss_equals_difference_quotients(kind, chunk):
    (hidden, head, targets, mask), expected = head_case(kind)
    gradient = jax.grad(
        lambda x: cross_entropy(x, head, targets, mask, Compute(), chunk=chunk)
    )(hidden)
    gradient /= mask.sum()
    quotients = difference_quotients(expected, np.float64(hidden))
    np.testing.assert_allclose(gradient, quotients, rtol=0, atol=1e-6)


def test_gradient_of_all_adapters_equals_the_difference_quotient(config):
    weights, tokens = random_weights(config), random_tokens(config, length=12)
    adapters = random_adapters(config, weights)
    targets, mask = np.roll(tokens, -1, axis=1), np.ones(tokens.shape, np.float32)
    mask[0, 5:] = 0
    model = Llama(LlamaConfig.from_hf(config))
    params = to_params(config, weights, adapters)
    trainable, frozen = split(params, trainable_mask(params))
    batch = {
        "tokens": jnp.asarray(tokens),
        "targets": jnp.asarray(targets),
        "loss_mask": jnp.asarray(mask),
        "segment_ids": jnp.ones(tokens.shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(12), tokens.shape),
    }

    def loss(tree):
        total = summed_loss(model, join(tree, frozen), batch, packed=False, chunk=5)
        return total / mask.sum()

    def moved(step):
        changed = {
            module: (a + step * along_a, b + step * along_b, scaling)
            for (module, (a, b, scaling)), (along_a, along_b) in zip(
                adapters.items(), along, strict=True
            )
        }
        logits = reference.forward(config, weights, tokens, changed)
        return reference.loss(logits, targets, mask)

    rng = np.random.default_rng(5)
    along = [
        tuple(rng.standard_normal(x.shape) for x in pair[:2])
        for pair in adapters.values()
    ]
    gradients = jax.jit(jax.grad(loss))(trainable)
    found = 0.0
    for module, direction in zip(adapters, along, strict=True):
        for leaf, d in zip(("lora_A", "lora_B"), direction, strict=True):
            found += (np.asarray(module_at(gradients, module)[leaf]) * d).sum()
    slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    # Terms of both signs cancel in the slope: measure against the gradient's size.
    norm = math.hypot(*(float(jnp.linalg.norm(g)) for g in jax.tree.leaves(gradients)))
    assert found == pytest.approx(slope, abs=1e-5 * norm)
