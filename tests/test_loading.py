from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.adapters import SEVEN, changed_copy, golden
from helpers.tiny import CONFIG, tensors, write_hf

import convert
import jlora
from jlora.config.run_config import MeshConfig
from jlora.errors import UsageError
from jlora.formats.peft.adapter_reader import read_adapter
from jlora.formats.peft.adapter_writer import save_adapter
from jlora.loading import model_for_text, open_adapter
from jlora.lora.adapter_tree import split, trainable_mask
from jlora.parallel.sharding import make_mesh
from jlora.train.checkpoint import save_checkpoint
from jlora.train.resuming import record_export


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_folder_gives_its_adapter_or_newest_checkpoint(tmp_path, finished):
    case = golden("patterns")
    _, _, params = case.load()
    trainable, _ = split(params, trainable_mask(params))
    expected = read_adapter(case.folder)
    settings = {
        "model": "base",
        "lora": {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": SEVEN,
            "rank_pattern": dict(expected.config.rank_pattern),
            "alpha_pattern": dict(expected.config.alpha_pattern),
        },
    }
    save_checkpoint(
        tmp_path / "checkpoints",
        3,
        {"trainable": trainable},
        {"settings": settings},
        keep=1,
    )
    if finished:
        save_adapter(trainable, expected.config, tmp_path / "adapter", "base")
        record_export(tmp_path, 3, 3)
    adapter = open_adapter(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, adapter.tensors, expected.tensors)
    assert adapter.scalings == expected.scalings
    assert adapter.config.base_model_name_or_path == "base"
    assert adapter.location == (tmp_path / "adapter" if finished else tmp_path)
    step = tmp_path / "checkpoints" / "3"
    for same in (open_adapter(step), open_adapter(tmp_path, 3), open_adapter(step, 3)):
        jax.tree.map(np.testing.assert_array_equal, same.tensors, expected.tensors)
    with pytest.raises(UsageError, match="no step 2; there are 3"):
        open_adapter(tmp_path, 2)
    with pytest.raises(UsageError, match="3 and step=2 name two steps"):
        open_adapter(step, 2)
    if finished:
        with pytest.raises(UsageError, match="holds no checkpoints, so step=3"):
            open_adapter(tmp_path / "adapter", 3)


def test_a_loaded_adapter_drops_out_where_a_key_is_given(tmp_path):
    case = golden("basic")
    folder = changed_copy(tmp_path / "adapter", "basic", {"lora_dropout": 0.5})
    model, params = convert.load(str(case.base), adapter=str(folder))
    quiet = np.asarray(model.apply({"params": params}, case.tokens))
    np.testing.assert_allclose(quiet, case.expected["logits"], rtol=0, atol=1e-4)
    key = {"dropout": jax.random.key(0)}
    noisy = np.asarray(model.apply({"params": params}, case.tokens, rngs=key))
    assert np.abs(noisy - quiet).max() > 0.1


def test_load_returns_model_params_and_no_tokenizer_where_there_is_none(tmp_path):
    folder = write_hf(tmp_path / "hf", CONFIG, tensors(CONFIG))
    model, params, tokenizer = jlora.load(folder)
    assert tokenizer is None
    logits: Any = model.apply({"params": params}, jnp.ones((1, 3), int))
    assert logits.shape == (1, 3, 20)
    again = convert.load(str(folder))[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again))


def test_params_on_a_mesh_are_those_of_one_device():
    case = golden("basic")
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    one = jlora.load(case.base, case.folder)[1]
    spread = jlora.load(case.base, case.folder, mesh=mesh)[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, one, spread))
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(spread)} == {mesh}


def test_an_adapter_is_merged_and_saved_from_a_mesh_as_from_one_device(tmp_path):
    case = golden("basic")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    merged = []
    for name, place in (("one", None), ("mesh", mesh)):
        params = jlora.load(case.base, case.folder, mesh=place).params
        merged.append(jlora.merge(params))
        jlora.save_adapter(params, read_adapter(case.folder).config, tmp_path / name)
    assert jax.tree.all(jax.tree.map(np.array_equal, *merged))
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(merged[1])} == {mesh}
    one, other = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("one", "mesh")
    )
    assert one == other


def test_a_model_prints_its_path_and_text_needs_a_tokenizer(tmp_path):
    folder = write_hf(tmp_path / "hf", CONFIG, tensors(CONFIG))
    loaded = jlora.load(folder, base_dtype="bfloat16")
    assert repr(loaded) == f"<Loaded of {folder}>"
    assert loaded.params["embed_tokens"]["embedding"].dtype == jnp.bfloat16
    with pytest.raises(UsageError, match="no tokenizer"):
        jlora.generate(*loaded, "a")


def test_text_on_several_tpus_has_attention_that_the_compiler_partitions(monkeypatch):
    monkeypatch.setattr("jlora.loading.default_platform", lambda: "tpu")
    config = jlora.LlamaConfig.from_hf(CONFIG)
    meshes = {1: "splash", 2: "xla"}
    for size, expected in meshes.items():
        mesh = make_mesh(MeshConfig(size))
        assert model_for_text(config, "bfloat16", mesh).attention == expected
    assert model_for_text(config, "bfloat16").attention == "splash"
