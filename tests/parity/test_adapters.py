import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import llamas
import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import convert
import jlora
from convert import to_hf, to_peft
from jlora.formats.peft.adapter_writer import save_adapter
from jlora.formats.tensor_names import all_names
from jlora.lora.adapter_tree import map_leaves

EVERY = [f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")]
ADAPTERS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "alpha_over_r": {"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "all_linear": {"r": 3, "target_modules": "all-linear"},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True},
    "regex": {"target_modules": r".*\.[02]\.(self_attn\.o|mlp\.down)_proj"},
    "layers": {"target_modules": EVERY, "layers_to_transform": [1]},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    "patterns": {
        "target_modules": EVERY,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 5},
        "alpha_pattern": {"down_proj": 24, r"0\.self_attn\.k_proj": 3.5},
    },
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"]},
    "olora": {"init_lora_weights": "olora", "use_rslora": True},
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "tables": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "dora_tables": {
        "use_dora": True,
        "target_modules": ["v_proj", "embed_tokens", "lm_head"],
    },
    "whole": {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "tokens": {"trainable_token_indices": [4, 2, 40]},
}


def randomise(model, *, on_a_grid=False):
    # On a grid of 1/16 every sum of products is exact, whatever the order it is made in.
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if (parameter.requires_grad and "lora_" not in name) or "magnitude" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
                continue
            if "lora_" not in name:
                continue
            if on_a_grid:
                parameter.copy_(torch.randint(-16, 17, parameter.shape) / 16)
            elif "lora_B" in name or "lora_embedding_A" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape))


def make(
    tmp_path,
    *,
    base="gqa",
    dtype=torch.float32,
    on_a_grid=False,
    more_tokens=0,
    **settings,
):
    """Writes base and adapter; returns the PEFT model and the two folders."""
    folders = tmp_path / "base", tmp_path / "adapter"
    llamas.save(folders[0], base, dtype)
    config = LoraConfig(**({"task_type": "CAUSAL_LM"} | settings))
    model = llamas.load(folders[0], dtype)
    if more_tokens:
        rows = model.config.vocab_size + more_tokens
        model.resize_token_embeddings(rows, mean_resizing=False)
    theirs = get_peft_model(model, config).eval()
    randomise(theirs, on_a_grid=on_a_grid)
    theirs.save_pretrained(folders[1])
    return theirs, *map(str, folders)


def apply(model, params, tokens):
    return np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(tokens)))


def leaf(params, path):
    for part in path.split("/"):
        params = params[part]
    return np.asarray(params)


def numpy_bits(tensor):
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.uint16).numpy()
    return tensor.detach().numpy().view(np.uint32)


def differing_bits(model, params, theirs):
    """Returns the keys whose merged weights differ from a state dict in any bit."""
    state = theirs.state_dict()
    return [
        name.key
        for name in all_names(model.config)
        if not np.array_equal(
            np.ascontiguousarray(name.to_params(leaf(params, name.path))).view(
                np.uint16 if state[name.key].dtype == torch.bfloat16 else np.uint32
            ),
            numpy_bits(state[name.key]),
        )
    ]


def test_a_lora_config_takes_every_field_of_peft_with_its_default():
    names = [field.name for field in fields(LoraConfig)]
    theirs: dict[str, Any] = {name: getattr(LoraConfig(), name) for name in names}
    assert jlora.LoraConfig(**theirs) == jlora.LoraConfig()
    assert theirs.keys() == jlora.LoraConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_with_a_peft_adapter_equal_peft(name, tmp_path):
    theirs, base, adapter = make(tmp_path, **ADAPTERS[name])
    model, params = convert.load(base, adapter=adapter)
    tokens = llamas.random_tokens()
    plain = convert.load(base)[1]
    ours = apply(model, params, tokens)
    assert np.abs(ours - apply(model, plain, tokens)).max() > 0.1
    expected = llamas.torch_logits(theirs, tokens)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("gqa", {"target_modules": ["q_proj"]}),
        ("gqa", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("gqa", {"modules_to_save": ["embed_tokens", "lm_head"]}),
        ("tied", {"modules_to_save": ["embed_tokens"]}),
        ("tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    ],
    ids=str,
)
def test_a_resized_vocabulary_gives_the_logits_of_peft_both_ways(
    base, settings, tmp_path
):
    theirs, folder, adapter = make(tmp_path, base=base, more_tokens=4, **settings)
    tokens = llamas.random_tokens()
    tokens[0, 0] = theirs.config.vocab_size - 1
    expected = llamas.torch_logits(theirs, tokens)
    model, params = convert.load(folder, adapter=adapter)
    np.testing.assert_allclose(
        apply(model, params, tokens), expected, rtol=0, atol=1e-4
    )
    out = str(tmp_path / "out")
    to_peft.main(to_peft.Arguments(out=out, adapter=adapter))
    resized = llamas.load(Path(folder))
    resized.resize_token_embeddings(theirs.config.vocab_size, mean_resizing=False)
    again = llamas.torch_logits(PeftModel.from_pretrained(resized, out).eval(), tokens)
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", ["biases", "head_dim", "llama3", "tied"])
def test_logits_with_an_adapter_on_every_kind_of_base_equal_peft(base, tmp_path):
    theirs, base, adapter = make(tmp_path, base=base, **ADAPTERS["all_linear"])
    model, params = convert.load(base, adapter=adapter)
    tokens = llamas.random_tokens()
    expected = llamas.torch_logits(theirs, tokens)
    np.testing.assert_allclose(
        apply(model, params, tokens), expected, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", ["defaults", "rslora", "patterns"])
def test_trainable_parameters_are_reported_as_by_peft(name, tmp_path):
    theirs, base, adapter = make(tmp_path, **ADAPTERS[name])
    params = convert.load(base, adapter=adapter)[1]
    trainable = sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    total = theirs.get_nb_trainable_parameters()[1]
    assert jlora.count_parameters(params) == (trainable, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["alpha_over_r", "all_linear", "rslora", "patterns"])
def test_merged_bits_equal_peft(name, dtype, tmp_path):
    settings = ADAPTERS[name]
    theirs, base, adapter = make(tmp_path, dtype=dtype, on_a_grid=True, **settings)
    model, params = convert.load(base, adapter=adapter, dtype="keep")
    merged = jlora.merge(params)
    assert differing_bits(model, merged, theirs.merge_and_unload()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_random_values_equal_peft_to_the_last_place(dtype, tmp_path):
    # Another BLAS may sum over r in another order, so bits are not promised here.
    theirs, base, adapter = make(tmp_path, dtype=dtype, **ADAPTERS["all_linear"])
    model, params = convert.load(base, adapter=adapter, dtype="keep")
    merged, state = jlora.merge(params), theirs.merge_and_unload().state_dict()
    eps = float(ml_dtypes.finfo(leaf(merged, "norm/scale").dtype).eps)
    for name in all_names(model.config):
        ours = np.float32(name.to_params(leaf(merged, name.path)))
        expected = state[name.key].float().numpy()
        np.testing.assert_allclose(ours, expected, rtol=eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["gqa", "biases", "tied"])
def test_exported_merged_folder_has_the_bits_of_peft(base, dtype, tmp_path):
    settings = ADAPTERS["alpha_over_r"]
    theirs, base, adapter = make(
        tmp_path, base=base, dtype=dtype, on_a_grid=True, **settings
    )
    out = tmp_path / "merged"
    to_hf.main(to_hf.Arguments(out=str(out), model=base, adapter=adapter))
    exported = llamas.load(out, dtype).state_dict()
    expected = theirs.merge_and_unload().state_dict()
    assert exported.keys() == expected.keys()
    assert [k for k in expected if not torch.equal(exported[k], expected[k])] == []


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 7.0, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "target_modules": "all-linear", "use_rslora": True},
        {"r": 4, "target_modules": EVERY, "rank_pattern": {"q_proj": 2}},
        {"r": 4, "target_modules": ["up_proj"], "layers_to_transform": [2]},
        {"r": 4, "target_modules": EVERY, "alpha_pattern": {r"1\.mlp\.\w+": 3}},
        {"r": 4, "target_modules": EVERY, "use_dora": True},
        {"r": 4, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"r": 4, "modules_to_save": ["lm_head", "norm"]},
        {"r": 4, "trainable_token_indices": [4, 2, 40]},
        {"r": 4, "target_modules": ["embed_tokens"], "use_dora": True},
    ],
)
def test_an_exported_adapter_gives_the_same_logits_in_peft(settings, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    theirs = llamas.save(base)
    config = jlora.LoraConfig(init_lora_weights=False, **settings)
    model, params = convert.load(str(base))
    params = moved(jlora.add_lora(params, config, jax.random.key(3)))
    save_adapter(params, config, adapter, str(base))
    tokens = llamas.random_tokens()
    expected = llamas.torch_logits(PeftModel.from_pretrained(theirs, adapter), tokens)
    ours = apply(model, params, tokens)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def moved(params):
    """Adds something to what an adapter starts with, so that nothing can be missed."""
    rng = np.random.default_rng(0)

    def move(path, leaf):
        if path[-1].startswith(("lora_magnitude", "trained_", "token_rows")):
            return leaf + np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32)
        return leaf

    return map_leaves(move, params)


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_what_started_from_the_base_is_plain_lora_to_peft(start, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    theirs = llamas.save(base)
    config = jlora.LoraConfig(r=3, init_lora_weights=start)
    model, params = convert.load(str(base))
    params = jlora.add_lora(params, config, jax.random.key(3))
    rng = np.random.default_rng(1)
    params = map_leaves(
        lambda path, leaf: (
            leaf + np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32)
            if path[-1] in ("lora_A", "lora_B")
            else leaf
        ),
        params,
    )
    save_adapter(params, config, adapter, str(base))
    tokens = llamas.random_tokens()
    expected = llamas.torch_logits(PeftModel.from_pretrained(theirs, adapter), tokens)
    ours = apply(model, params, tokens)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_an_exported_adapter_on_a_tied_base_gives_the_same_logits_in_peft(
    settings, tmp_path
):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    theirs = llamas.save(base, "tied")
    config = jlora.LoraConfig(r=4, init_lora_weights=False, **settings)
    model, params = convert.load(str(base))
    params = moved(jlora.add_lora(params, config, jax.random.key(3)))
    save_adapter(params, config, adapter, str(base))
    tokens = llamas.random_tokens()
    expected = llamas.torch_logits(PeftModel.from_pretrained(theirs, adapter), tokens)
    ours = apply(model, params, tokens)
    # Normal factors on the embedding make logits of several hundreds, of which every
    # logit is a sum: float32's rounding goes with the largest.
    tolerance = 1e-4 + 1e-6 * float(np.abs(expected).max())
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)


def test_an_exported_adapter_names_every_tensor_as_peft_does(tmp_path):
    theirs, base, adapter = make(tmp_path, **ADAPTERS["all_linear"])
    params = convert.load(base, adapter=adapter)[1]
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
    config = jlora.LoraConfig(
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        target_modules=settings["target_modules"],
    )
    out = tmp_path / "again"
    save_adapter(params, config, out, base)
    again = PeftModel.from_pretrained(llamas.load(base), out)
    expected = theirs.state_dict()
    found = again.state_dict()
    assert [k for k in expected if not torch.equal(found[k], expected[k])] == []
