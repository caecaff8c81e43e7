import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.training_cases import (
    ADAM,
    LENGTH,
    Run,
    adapted_params,
    llama_config,
    ragged_batch,
)

from jlora.config.lora_config import LoraConfig
from jlora.config.run_config import MeshConfig
from jlora.errors import CorruptError, UsageError
from jlora.formats.digests import fingerprint
from jlora.lora.adapter_tree import join, trainable_mask
from jlora.lora.embedding_and_head import head_parameters
from jlora.model.loss import cross_entropy
from jlora.ops.compute_choices import Compute
from jlora.train.checkpoint import (
    adapter_of_step,
    load_newest,
    restore_into,
    save_checkpoint,
)
from jlora.train.evaluation import make_eval_step
from jlora.train.resuming import resume_all
from jlora.train.step import summed_loss


def batch_of(step: int = 0) -> dict[str, jax.Array]:
    return {key: jnp.asarray(value) for key, value in ragged_batch(step).items()}


HARD = {"optim": replace(ADAM, max_grad_norm=0.5), "grad_accum_steps": 2}
META = {"settings": {"lora": {}}, "identity": {"data": "x", "lora": {"r": 2}}}


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same_bits(a: Any, b: Any) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def dot_shapes(text: str) -> set[tuple[int, ...]]:
    """The sorted shapes of what every dot of an HLO text makes."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* dot\(", text)
    return {tuple(sorted(int(n) for n in shape.split(",") if n)) for shape in found}


def frozen_shapes(frozen: Any) -> set[tuple[int, ...]]:
    return {tuple(sorted(x.shape)) for x in jax.tree.leaves(frozen) if x.ndim == 2}


# Freezing


@pytest.mark.parametrize("settings", [{}, HARD])
def test_the_base_is_bit_identical_after_training(settings):
    run = Run(**settings)
    before = leaves(run.frozen)
    run.train(4)
    assert_same_bits(before, run.frozen)


def test_training_moves_every_adapter_leaf():
    run = Run()
    before = leaves(run.state.trainable)
    run.train(1)
    after = leaves(run.state.trainable)
    assert all((x != y).any() for x, y in zip(before, after, strict=True))


def test_optimizer_state_holds_two_moments_per_adapter_number_and_counters():
    run = Run()
    adapter = sum(x.size for x in leaves(run.state.trainable))
    arrays = leaves(run.state.opt_state)
    assert sum(x.nbytes for x in arrays if x.ndim) == 2 * 4 * adapter
    assert all(x.nbytes <= 4 for x in arrays if not x.ndim)


@pytest.mark.parametrize("settings", [{}, HARD, {"remat": "minimal"}])
def test_no_dot_of_the_step_makes_a_frozen_weights_gradient(settings):
    run = Run(**settings)
    lowered = run.step.lower(run.state, run.frozen, ragged_batch())
    dots = dot_shapes(lowered.as_text(dialect="hlo"))
    assert len(dots) > 5
    assert not dots & frozen_shapes(run.frozen)


def test_the_search_finds_gradients_of_weights_that_are_differentiated():
    run = Run()

    def loss(frozen):
        params = join(run.state.trainable, frozen)
        return summed_loss(run.model, params, batch_of(), packed=True, chunk=4)

    text = jax.jit(jax.grad(loss)).lower(run.frozen).as_text(dialect="hlo")
    assert dot_shapes(text) & frozen_shapes(run.frozen)


def test_weight_decay_reaches_adapters_only():
    params = adapted_params(llama_config(num_hidden_layers=1))
    run = Run(optim=replace(ADAM, weight_decay=0.5), params=params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates: Any = run.optimizer.update(zeros, run.optimizer.init(params), params)[0]
    moved = jax.tree.map(lambda x: bool((x != 0).any()), updates)
    assert moved == trainable_mask(params)


# Loss


def test_loss_is_the_mean_over_supervised_tokens_of_the_whole_batch():
    run, batch = Run(), batch_of()
    params = join(run.state.trainable, run.frozen)
    logits: Any = run.model.apply(
        {"params": params},
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    expected = (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    assert run.train(1)[0]["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_evaluation_sums_the_same_loss():
    run, batch = Run(), batch_of()
    params = join(run.state.trainable, run.frozen)
    total, count = make_eval_step(run.model, run.mesh, params=params)(params, batch)
    assert float(total / count) == pytest.approx(run.train(1)[0]["loss"], rel=1e-6)


def test_the_whole_logits_never_exist(monkeypatch):
    monkeypatch.setattr(Compute, "loss_chunk_tokens", 256)
    run = Run()
    text = str(run.step.lower(run.state, run.frozen, ragged_batch()).as_text())
    vocab = run.model.config.vocab_size
    rows = ragged_batch()["tokens"].shape[0]
    whole = f"{rows}x{LENGTH}x{vocab}x"
    assert whole not in text
    assert f"{rows}x{LENGTH // 2}x{vocab}x" in text  # two chunks hold this small batch
    hidden = jnp.zeros((rows, LENGTH, run.model.config.hidden_size))
    batch = batch_of()
    chunked = jax.jit(
        lambda h: cross_entropy(
            h,
            head_parameters(run.frozen),
            batch["targets"],
            batch["loss_mask"],
            Compute(),
            chunk=2,
        )
    )
    assert whole not in str(chunked.lower(hidden).as_text())


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_masked_infinity_does_not_reach_the_loss_or_gradient(poison, chunk):
    targets, weights = jnp.zeros((1, 3), jnp.int32), jnp.array([[1.0, 0.0, 1.0]])
    hidden = jnp.zeros((1, 3, 4)).at[0, 1].set(poison)
    adapter = {"lora_A": jnp.ones((4, 2)), "lora_B": jnp.ones((2, 4))}

    def loss(hidden, adapter):
        head = {"kernel": jnp.eye(4), "lora_scaling": jnp.float32(1), **adapter}
        return cross_entropy(hidden, head, targets, weights, Compute(), chunk=chunk)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, adapter)
    clean = jax.grad(loss, argnums=(0, 1))(jnp.zeros((1, 3, 4)), adapter)
    assert float(value) == pytest.approx(2 * np.log(4))
    assert_same_bits(gradients, clean)


# Steps that are not applied


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_counters(poison):
    run = Run()
    run.train(1)
    before = jax.tree.map(np.asarray, run.state)
    good = run.frozen
    run.frozen = jax.tree.map(lambda x: x * poison, good)
    first, second = run.train(2)
    assert (first["in_a_row"], second["in_a_row"], second["skipped"]) == (1, 2, 2)
    assert_same_bits(before.trainable, run.state.trainable)
    assert_same_bits(before.opt_state, run.state.opt_state)
    run.frozen = good
    assert run.train(1)[0]["in_a_row"] == 0


def test_a_batch_with_nothing_to_learn_is_skipped():
    run = Run()
    before = leaves(run.state.trainable)
    batch = ragged_batch()
    batch["loss_mask"] *= 0
    run.state, metrics = run.step(run.state, run.frozen, batch)
    assert (float(metrics["loss"]), int(metrics["skipped"])) == (0, 1)
    assert_same_bits(before, run.state.trainable)


# Schedule and clipping


def test_clipping_sees_the_adapters_gradient_only():
    params = adapted_params(llama_config(num_hidden_layers=1))
    run = Run(optim=replace(ADAM, max_grad_norm=1e-3, adam_eps=1.0), params=params)
    ones = jax.tree.map(jnp.ones_like, params)
    huge = jax.tree.map(lambda x, m: x if m else 1e9 * x, ones, trainable_mask(params))
    state = run.optimizer.init(params)
    a, _ = run.optimizer.update(ones, state, params)
    b, _ = run.optimizer.update(huge, state, params)
    assert_same_bits(a, b)


# Checkpoints


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    whole = Run(lora_dropout=0.2)
    whole.train(6)
    first = Run(lora_dropout=0.2)
    first.train(3)
    save_checkpoint(tmp_path / "checkpoints", 3, first.state, META, keep=2)
    second = Run(lora_dropout=0.2)
    [(second.state, _)] = resume_all([tmp_path], [second.state], [META], mode="must")
    second.train(3)
    assert_same_bits(whole.state, second.state)


def test_a_run_goes_on_from_one_device_to_eight(tmp_path):
    whole, first = Run(), Run()
    expected = whole.train(4)[-1]["loss"]
    first.train(2)
    save_checkpoint(tmp_path / "checkpoints", 2, first.state, META, keep=2)
    second = Run(MeshConfig(data=2, fsdp=2, tensor=2))
    [(second.state, _)] = resume_all([tmp_path], [second.state], [META], mode="auto")
    assert second.train(2)[-1]["loss"] == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def saved_run(tmp_path):
    run = Run()
    for step in (1, 2):
        run.train(1)
        save_checkpoint(tmp_path / "checkpoints", step, run.state, META, keep=2)
    return tmp_path


def replace_arrays(folder: Path, step: str, other: str) -> None:
    """Orbax restores them without an error; only the digests know better."""
    shutil.rmtree(folder / step / "state")
    shutil.copytree(folder / other / "state", folder / step / "state")


def test_a_damaged_checkpoint_is_passed_over_and_named(saved_run):
    replace_arrays(saved_run / "checkpoints", "2", "1")
    saved, problems = load_newest(saved_run / "checkpoints")
    assert saved is not None
    assert saved.step == 1
    assert "checkpoints/2" in problems[0]


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_that_fell_back_saves_over_the_damaged_steps(saved_run, step):
    folder = saved_run / "checkpoints"
    shutil.copytree(folder / "2", folder / "3")
    for damaged in ("2", "3"):
        replace_arrays(folder, damaged, "1")
    run = Run()
    [(run.state, _)] = resume_all([saved_run], [run.state], [META], mode="must")
    run.train(step - 1)
    save_checkpoint(folder, step, run.state, META, keep=2)
    saved, _ = load_newest(folder)
    assert saved is not None
    assert saved.step == step
    assert_same_bits(restore_into(Run().state, saved), run.state)


def test_without_a_valid_checkpoint_nothing_is_deleted(saved_run):
    replace_arrays(saved_run / "checkpoints", "2", "1")
    (saved_run / "checkpoints" / "1" / "meta" / "metadata").write_text("{")
    before = sorted(saved_run.rglob("*"))
    with pytest.raises(CorruptError, match="no valid checkpoint"):
        load_newest(saved_run / "checkpoints")
    assert sorted(saved_run.rglob("*")) == before


@pytest.mark.parametrize("schema", [1, 2])
def test_the_adapter_of_a_run_of_a_schema_before_can_be_read(saved_run, schema):
    file = saved_run / "checkpoints" / "2" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    lora = asdict(LoraConfig(r=2))
    del meta["digest"]  # which schema 3 added
    file.write_text(json.dumps(meta | {"schema": schema, "settings": {"lora": lora}}))
    run = Run()
    run.train(2)
    assert_same_bits(adapter_of_step(saved_run / "checkpoints")[1], run.state.trainable)


def test_resuming_with_other_settings_names_what_differs(saved_run):
    other = {"data": "y", "lora": {"r": 4}}
    with pytest.raises(UsageError, match=r"the data differs, lora\.r is 4, was 2"):
        resume_all([saved_run], [Run().state], [{"identity": other}], mode="auto")


def test_where_the_base_is_found_may_change_in_a_resumed_run(saved_run):
    lora = LoraConfig(r=2, base_model_name_or_path="owner/name", revision="abc")
    other = {"data": "x", "lora": asdict(lora)}
    resume_all([saved_run], [Run().state], [{"identity": other}], mode="must")


def test_a_setting_that_is_newer_than_the_run_had_its_default(saved_run):
    other = {"data": "x", "lora": asdict(LoraConfig(r=2, use_dora=True))}
    with pytest.raises(UsageError, match=r"step 2: lora\.use_dora is true, was false;"):
        resume_all([saved_run], [Run().state], [{"identity": other}], mode="must")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_fingerprint_sees_any_two_values_trade_places(dtype):
    values = np.array([[1, -1, 2, -2], [0.5, -0.0, 0.0, 3]], dtype)
    seen = {fingerprint({"w": jnp.asarray(values)})}
    for i in range(values.size):
        for j in range(i):
            other = values.reshape(-1).copy()
            other[[i, j]] = other[[j, i]]
            seen.add(fingerprint({"w": jnp.asarray(other.reshape(values.shape))}))
    assert len(seen) == 1 + values.size * (values.size - 1) // 2
