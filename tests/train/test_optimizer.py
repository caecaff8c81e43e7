from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_cases import ONE_DEVICE, Run, adapted_params, llama_config

from jlora.config.lora_config import LoraConfig
from jlora.config.optim_config import OptimConfig
from jlora.config.run_config import ComputeConfig, MeshConfig
from jlora.errors import UsageError
from jlora.lora.adapter_tree import split, trainable_mask
from jlora.parallel.sharding import make_mesh
from jlora.train import adam_8bit
from jlora.train.checkpoint import save_checkpoint
from jlora.train.memory_estimate import memory_bytes, plan_workload
from jlora.train.optimizer import (
    Hyperparameters,
    group_of,
    make_optimizer,
    make_schedule,
)
from jlora.train.resuming import resume_all

STEPS, RATE = 5, 1e-2
B1, B2, EPS = 0.9, 0.999, 1e-8


def named(tree):
    return {
        ".".join(entry.key for entry in path): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def adapted():
    """Layers of two kinds, and of one kind with two ranks: the optimizer stacks them."""
    lora = LoraConfig(
        r=4,
        target_modules=r"model\.layers\.(\d\.self_attn\.q|[02]\.mlp\.up)_proj",
        rank_pattern={r"layers\.2\.mlp\.up_proj": 2},
    )
    params = adapted_params(llama_config(num_hidden_layers=3), lora)
    mask = trainable_mask(params)
    return params, [name for name, trains in named(mask).items() if trains]


def gradients(params, step):
    rng = np.random.default_rng(step)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params
    )


def train(config):
    params, names = adapted()
    optimizer = make_optimizer(config, make_schedule(config, STEPS))
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for step in range(STEPS):
        updates, state = update(gradients(params, step), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    found = named(params)
    return {name: found[name] for name in names}


def adamw_in_float64(settings, max_norm):
    """AdamW with (learning rate, decay) per leaf, linear decay of the rate, clipping."""
    params, names = adapted()
    values = {name: named(params)[name] for name in names}
    first, second = ({n: np.zeros(()) for n in names} for _ in range(2))
    for step in range(STEPS):
        drawn = named(gradients(params, step))
        norm = np.sqrt(sum((drawn[name] ** 2).sum() for name in names))
        for name in names:
            gradient = drawn[name] * min(1, max_norm / norm)
            rate, decay = settings(name)
            first[name] = B1 * first[name] + (1 - B1) * gradient
            second[name] = B2 * second[name] + (1 - B2) * gradient**2
            root = np.sqrt(second[name] / (1 - B2 ** (step + 1)))
            moved = first[name] / (1 - B1 ** (step + 1)) / (root + EPS)
            rate *= 1 - step / STEPS
            values[name] = values[name] - rate * (moved + decay * values[name])
    return values


@pytest.mark.parametrize(
    ("changes", "b_rate", "a_decay", "b_decay", "max_norm"),
    [
        ({}, RATE, 0.0, 0.0, 1.0),
        ({"weight_decay": 0.3}, RATE, 0.3, 0.3, 1.0),
        ({"loraplus_lr_ratio": 16, "weight_decay": 0.3}, 16 * RATE, 0.3, 0.3, 1.0),
        ({"weight_decay": 0.3, "max_grad_norm": 0.0}, RATE, 0.3, 0.3, np.inf),
        (
            {"weight_decay": 0.3, "group_weight_decay": {"lora_B": 0.1}},
            *(RATE, 0.3, 0.1, 1.0),
        ),
    ],
)
def test_five_steps_equal_adamw_in_float64(changes, b_rate, a_decay, b_decay, max_norm):
    def settings(name):
        return (b_rate, b_decay) if name.endswith("lora_B") else (RATE, a_decay)

    config = OptimConfig(
        learning_rate=RATE, lr_schedule="linear", warmup_ratio=0, **changes
    )
    found, expected = train(config), adamw_in_float64(settings, max_norm)
    assert found.keys() == expected.keys()
    for name in expected:
        # 1 - b2^step is exact to 6e-5 in float32, and its root scales every step.
        tolerance = 1e-6 + 1e-4 * settings(name)[0]
        np.testing.assert_allclose(
            found[name], expected[name], rtol=0, atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize(
    ("path", "group"),
    [
        ("layers.0.self_attn.q_proj.lora_A", "lora_A"),
        ("layers.0.self_attn.q_proj.lora_B", "lora_B"),
        ("layers.0.self_attn.q_proj.lora_magnitude", "magnitude"),
        ("embed_tokens.lora_A", "embedding"),
        ("embed_tokens.lora_B", "embedding"),
        ("lm_head.lora_B", "lora_B"),
        ("lm_head.trained_kernel", "whole"),
        ("embed_tokens.trained_embedding", "whole"),
        ("embed_tokens.token_rows", "whole"),
        ("norm.trained_scale", "norm"),
        ("layers.0.self_attn.q_proj.trained_bias", "norm"),
    ],
)
def test_every_leaf_that_can_train_has_a_group(path, group):
    assert group_of(tuple(path.split("."))) == group


def test_layers_with_the_same_leaves_share_one_update():
    params, _ = adapted()
    optimizer = make_optimizer(OptimConfig(), make_schedule(OptimConfig(), STEPS))
    moments = {
        tuple(entry.key for entry in path if hasattr(entry, "key"))[-4:]: leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(optimizer.init(params))
        if any(getattr(entry, "name", "") == "mu" for entry in path)
    }
    assert moments == {  # of layers 0 and 2, with up's larger rank, and of layer 1
        ("0", "self_attn", "q_proj", "lora_A"): (2, 32, 4),
        ("0", "self_attn", "q_proj", "lora_B"): (2, 4, 64),
        ("0", "mlp", "up_proj", "lora_A"): (2, 32, 4),
        ("0", "mlp", "up_proj", "lora_B"): (2, 4, 48),
        ("1", "self_attn", "q_proj", "lora_A"): (1, 32, 4),
        ("1", "self_attn", "q_proj", "lora_B"): (1, 4, 64),
    }


def test_the_plan_counts_the_gradient_and_the_moments_of_every_adapter():
    params, _ = adapted()
    trainable, _ = split(params, trainable_mask(params))
    optimizer = make_optimizer(OptimConfig(), make_schedule(OptimConfig(), STEPS))
    sizes = [4 * x.size for x in jax.tree.leaves(trainable)]
    moments = [4 * x.size for x in jax.tree.leaves(optimizer.init(params)) if x.ndim]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    work = plan_workload(
        llama_config(num_hidden_layers=3),
        params,
        mesh,
        compute=ComputeConfig(),
        rows=1,
        length=8,
        adapters=3,
    )
    found = memory_bytes(params, work)["optimizer and gradients"]
    assert found == 3 * (sum(sizes) + sum(moments))


def test_the_plan_counts_moments_of_8_bits(monkeypatch):
    monkeypatch.setattr(adam_8bit, "SMALLEST", 200)
    params, _ = adapted()
    trainable, _ = split(params, trainable_mask(params))
    config = OptimConfig(optimizer="adamw_8bit")
    state = make_optimizer(config, make_schedule(config, STEPS)).init(params)
    sizes = [x.size for x in jax.tree.leaves(trainable)]
    moments = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)
    assert moments < 8 * sum(sizes)
    work = plan_workload(
        llama_config(num_hidden_layers=3),
        params,
        make_mesh(MeshConfig(), jax.devices()[:1]),
        compute=ComputeConfig(),
        rows=1,
        length=8,
        optimizer="adamw_8bit",
    )
    found = memory_bytes(params, work)["optimizer and gradients"]
    assert found == 4 * sum(sizes) + moments + 8 * max(sizes)


def test_lora_plus_gives_pefts_rates_to_the_groups():
    config = OptimConfig(learning_rate=1e-4, loraplus_lr_ratio=16.0)
    assert Hyperparameters.of(config).rates == {
        "lora_A": 1,
        "whole": 1,
        "embedding": pytest.approx(1e-2),
        "lora_B": 16,
        "magnitude": 16,
        "norm": 16,
    }


def test_norms_and_biases_decay_only_when_asked_to():
    assert Hyperparameters.of(OptimConfig(weight_decay=0.1)).decays["norm"] == 0
    asked = OptimConfig(weight_decay=0.1, group_weight_decay={"norm": 0.2})
    assert Hyperparameters.of(asked).decays["norm"] == 0.2


def test_groups_lie_inside_the_mask():
    params, names = adapted()
    config = OptimConfig(warmup_ratio=0, weight_decay=0.5, loraplus_lr_ratio=4.0)
    optimizer = make_optimizer(config, make_schedule(config, STEPS))
    ones = jax.tree.map(jnp.ones_like, params)
    updates = named(optimizer.update(ones, optimizer.init(params), params)[0])
    assert {name for name, update in updates.items() if update.any()} == set(names)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group_weight_decay": {"lora_C": 0.1}}, "'lora_C'; did you mean 'lora_"),
        ({"group_weight_decay": {"lora_A": -1.0}}, "lora_A=-1.0; expected at least 0"),
        ({"loraplus_lr_ratio": -1.0}, "optim.loraplus_lr_ratio=-1.0"),
        (
            {"loraplus_lr_embedding": -1.0, "loraplus_lr_ratio": 2.0},
            "lr_embedding=-1.0",
        ),
        ({"learning_rate": 0.0, "loraplus_lr_ratio": 2.0}, "learning_rate above 0"),
    ],
)
def test_a_setting_of_a_group_out_of_range_is_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        OptimConfig(**changes)


COSINE = [0.5 + 0.5 * np.cos(np.pi * i / 8) for i in range(8)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_schedule": "constant"}, [0, 0.5, *[1.0] * 8]),
        ({"lr_schedule": "linear"}, [0, 0.5, *(1 - i / 8 for i in range(8))]),
        ({"lr_schedule": "cosine"}, [0, 0.5, *COSINE]),
        (
            {"lr_schedule": "cosine", "min_lr_ratio": 0.2},
            [0, 0.5, *(0.8 * x + 0.2 for x in COSINE)],
        ),
        (
            {"lr_schedule": "wsd", "decay_ratio": 0.4},
            [0, 0.5, 1, 1, 1, 1, *COSINE[::2]],
        ),
        (
            {"lr_schedule": "inverse_sqrt"},
            [0, 0.5, *(np.sqrt(2 / (2 + i)) for i in range(8))],
        ),
        (
            {"lr_schedule": "constant", "warmup_steps": 4},
            [0, 0.25, 0.5, 0.75, *[1.0] * 6],
        ),
    ],
)
def test_a_schedule_rises_over_the_warm_up_then_falls(settings, expected):
    warmup = {} if "warmup_steps" in settings else {"warmup_ratio": 0.2}
    config = OptimConfig(learning_rate=1.0, **warmup, **settings)
    schedule = make_schedule(config, 10)
    found = np.array([np.asarray(schedule(i)) for i in range(10)])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["linear", "cosine", "constant", "wsd", "inverse_sqrt"]
)
def test_a_run_of_one_step_learns(kind):
    config = OptimConfig(learning_rate=0.5, lr_schedule=kind, warmup_steps=10)
    assert make_schedule(config, 1)(0) == 0.5


def test_a_run_shorter_than_warm_up_and_decay_keeps_the_warm_up():
    config = OptimConfig(lr_schedule="wsd", learning_rate=1.0, warmup_ratio=0.8)
    schedule = make_schedule(replace(config, decay_ratio=0.9), 10)
    found = [np.asarray(schedule(i)) for i in range(10)]
    np.testing.assert_allclose(found, [*(i / 8 for i in range(8)), 1, 0.5], atol=1e-6)


def others_in_float64(rule):
    """Five steps by `rule(gradient, memory, step)`, without clipping, at a constant rate."""
    params, names = adapted()
    values = {name: named(params)[name] for name in names}
    memories: dict[str, dict[str, np.ndarray]] = {name: {} for name in names}
    for step in range(STEPS):
        drawn = named(gradients(params, step))
        for name in names:
            moved = rule(drawn[name], memories[name], step)
            values[name] = values[name] - RATE * (moved + 0.3 * values[name])
    return values


def lion(gradient, memory, _):
    before = memory.get("m", 0 * gradient)
    memory["m"] = 0.99 * before + 0.01 * gradient
    return np.sign(0.9 * before + 0.1 * gradient)


def adafactor(gradient, memory, step):
    """HF's Adafactor with scale_parameter=False and relative_step=False."""
    decay = 1 - (step + 1.0) ** -0.8
    square = gradient**2 + 1e-30
    for axis in (0, 1):
        mean = square.mean(axis, keepdims=True)
        memory[axis] = decay * memory.get(axis, 0 * mean) + (1 - decay) * mean
    rows, columns = memory[1], memory[0]
    update = gradient / np.sqrt(rows / rows.mean() * columns)
    return update / max(1, np.sqrt((update**2).mean()))


@pytest.mark.parametrize(
    ("name", "rule"),
    [("lion", lion), ("adafactor", adafactor)],
    ids=["lion", "adafactor"],
)
def test_five_steps_equal_the_formula_in_float64(name, rule):
    config = OptimConfig(
        optimizer=name,
        learning_rate=RATE,
        lr_schedule="constant",
        warmup_ratio=0,
        weight_decay=0.3,
        max_grad_norm=0,
    )
    found, expected = train(config), others_in_float64(rule)
    for leaf, values in expected.items():
        np.testing.assert_allclose(
            found[leaf], values, rtol=0, atol=1e-4 * RATE + 1e-6, err_msg=leaf
        )


def test_muon_moves_pairs_by_orthogonal_matrices_as_large_as_adams_updates():
    params, names = adapted()
    config = OptimConfig(
        optimizer="muon", learning_rate=1.0, lr_schedule="constant", warmup_ratio=0
    )
    optimizer = make_optimizer(config, make_schedule(config, STEPS))
    state = optimizer.init(params)
    updates = named(optimizer.update(gradients(params, 0), state, params)[0])
    for name in names:
        update = updates[name]
        singular = np.linalg.svd(update, compute_uv=False)
        ones = singular / (0.2 * np.sqrt(max(update.shape)))
        # Newton and Schulz's iteration stops when they are near 1.
        assert 0.6 < ones.min() <= ones.max() < 1.3, name


@pytest.mark.parametrize("name", ["lion", "muon", "adafactor", "adamw_8bit"])
def test_every_optimizer_trains_on_every_mesh_and_resumes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(adam_8bit, "SMALLEST", 1)
    optim = OptimConfig(optimizer=name, learning_rate=1e-3, warmup_ratio=0)
    runs = [Run(mesh, optim=optim) for mesh in (ONE_DEVICE, MeshConfig(2, 2, 2))]
    one, many = (run.train(3) for run in runs)
    for a, b in zip(one, many, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert one[-1]["grad_norm"] > 0
    meta: dict[str, Any] = {"identity": {}, "settings": {}}
    save_checkpoint(tmp_path / "checkpoints", 3, runs[0].state, meta, keep=1)
    resumed = Run(optim=optim)
    [(resumed.state, _)] = resume_all([tmp_path], [resumed.state], [meta], mode="must")
    assert resumed.train(1) == runs[0].train(1)
