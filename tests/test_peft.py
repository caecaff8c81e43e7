import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from adapters import CASES, GOLDEN, REFUSED, bits, changed_copy, golden, tensors

import jlora
from convert.names import module_name, module_path
from convert.peft import (
    Adapter,
    attach_adapter,
    check_fit,
    open_adapter,
    read_adapter,
    write_adapter,
)
from convert.source import open_source
from jlora.checkpoint import RunCheckpoints
from jlora.errors import CorruptError, JloraError, UnsupportedError, UsageError
from jlora.lora import join, module_at, split, trainable_mask

# The keys that PEFT has known since 0.6; an older PEFT stops at any other.
OLDEST_KEYS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
}
SEVEN = sorted(
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
)
Q = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@pytest.fixture(params=CASES)
def case(request):
    return golden(request.param)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "adapter"


def config_of(base):
    return open_source(str(GOLDEN / "_base" / base)).config


def read_settings(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(case, folder, **kwargs):
    _, _, params = case.load()
    config = read_adapter(case.folder).config
    write_adapter(params, config, folder, "base", **kwargs)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused(name):
    with pytest.raises(UnsupportedError):
        read_adapter(GOLDEN / name)


def test_modules_ranks_and_scalings_equal_peft(case):
    adapter = read_adapter(case.folder)
    names = sorted(map(module_name, adapter.tensors))
    pairs = [adapter.tensors[module_path(name)] for name in names]
    assert names == list(case.expected["targeted"])
    assert [pair["lora_A"].shape[1] for pair in pairs] == list(case.expected["r"])
    scalings = [adapter.scalings[module_path(name)] for name in names]
    assert scalings == list(case.expected["scaling"])


def test_an_adapter_of_peft_fits_its_base(case):
    check_fit(read_adapter(case.folder), open_source(str(case.base)).config)


def test_logits_equal_peft(case):
    model, _, params = case.load()
    logits = model.apply({"params": params}, case.tokens)
    # Both sum in float32, in another order: measured 1e-5 at most.
    np.testing.assert_allclose(logits, case.expected["logits"], rtol=0, atol=1e-4)


def test_merged_weights_equal_peft_bit_for_bit(case):
    _, _, params = case.load(dtype="keep")
    merged = jlora.merge(params)
    for key, value in case.expected.items():
        if key.startswith("merged/"):
            name = key.removeprefix("merged/").removesuffix(".weight")
            kernel = np.asarray(module_at(merged, name)["kernel"])
            np.testing.assert_array_equal(bits(np.ascontiguousarray(kernel.T)), value)


def test_merged_in_one_rounding_not_two():
    case = golden("bf16")
    _, _, params = case.load(dtype="keep")
    [key] = [key for key in case.expected if key.startswith("safe_merge/")]
    name = key.removeprefix("safe_merge/").removesuffix(".weight")
    kernel = np.asarray(module_at(jlora.merge(params), name)["kernel"])
    twice = case.expected[key]
    assert (bits(np.ascontiguousarray(kernel.T)) != twice).mean() > 0.05


def test_logits_of_the_merged_model_equal_peft(case):
    model, *_ = case.load()
    _, _, params = case.load(dtype="keep")
    logits = model.apply({"params": jlora.merge(params)}, case.tokens)
    expected = case.expected["logits_merged"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_parameter_counts_equal_peft(case):
    _, _, params = case.load()
    expected = (case.expected["trainable_params"], case.expected["all_params"])
    assert jlora.count_parameters(params) == expected


@pytest.mark.parametrize("name", ["patterns", "tied"])
def test_gradients_equal_peft(name):
    case = golden(name)
    model, _, params = case.load()
    tokens = case.tokens
    trainable, frozen = split(params, trainable_mask(params))

    def loss(trainable):
        logits = model.apply({"params": join(trainable, frozen)}, tokens)
        log_p = jax.nn.log_softmax(logits[:, :-1])  # pyright: ignore
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()

    value, gradients = jax.value_and_grad(loss)(trainable)
    assert float(value) == pytest.approx(float(case.expected["loss"]), abs=2e-5)
    for key, expected in case.expected.items():
        if key.startswith("grad/"):
            prefix = "grad/base_model.model."
            module, leaf, _ = key.removeprefix(prefix).rsplit(".", 2)
            gradient = module_at(gradients, module)[leaf].T
            # float32 sums in another order, measured 4e-6 of the largest element.
            limit = 1e-4 * np.abs(expected).max()
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=limit)


def test_attached_leaves_share_the_base(case):
    _, base, params = case.load()
    name = str(case.expected["targeted"][0])
    assert module_at(params, name)["kernel"] is module_at(base, name)["kernel"]
    assert "lora_A" not in module_at(base, name)


def test_written_adapter_reads_back_equal(case, folder):
    before, after = read_adapter(case.folder), read_adapter(rewrite(case, folder))
    jax.tree.map(np.testing.assert_array_equal, before.tensors, after.tensors)
    assert before.scalings == after.scalings
    fields = ("r", "lora_alpha", "lora_dropout", "use_rslora")
    for field in fields:
        assert getattr(before.config, field) == getattr(after.config, field)


def test_written_adapter_selects_what_it_holds(case, folder):
    check_fit(read_adapter(rewrite(case, folder)), open_source(str(case.base)).config)


def test_written_tensors_are_those_of_peft_in_float32(case, folder):
    expected = tensors(case.folder)
    written = tensors(rewrite(case, folder))
    assert written.keys() == expected.keys()
    for key, value in written.items():
        np.testing.assert_array_equal(value, expected[key].astype(np.float32))
        assert value.dtype == np.float32


def test_written_keys_are_those_the_oldest_peft_knows(case, folder):
    keys = read_settings(rewrite(case, folder)).keys()
    more = {"use_rslora"} if read_adapter(case.folder).config.use_rslora else set()
    assert keys == OLDEST_KEYS | more


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("basic", ["q_proj", "v_proj"]),
        ("all_linear", SEVEN),
        ("patterns", SEVEN),
        (
            "regex",
            [
                "model.layers.1.mlp.up_proj",
                "model.layers.1.self_attn.k_proj",
                "model.layers.1.self_attn.q_proj",
            ],
        ),
        (
            "exclude",
            [
                "model.layers.0.mlp.up_proj",
                "model.layers.1.mlp.up_proj",
                "model.layers.1.self_attn.q_proj",
            ],
        ),
        (
            "layers",
            ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
        ),
    ],
)
def test_written_targets_are_suffixes_if_they_suffice(name, targets, folder):
    settings = read_settings(rewrite(golden(name), folder))
    assert settings["target_modules"] == targets


@pytest.mark.parametrize(
    ("name", "count"), [("basic", 2), ("layers", 2), ("exclude", 3)]
)
def test_targets_are_the_same_without_the_base_at_hand(name, count, folder):
    case = golden(name)
    _, _, params = case.load()
    trainable, _ = split(params, trainable_mask(params))
    config = read_adapter(case.folder).config
    write_adapter(trainable, config, folder, "base")
    written = read_settings(folder)
    rewrite(case, folder, overwrite=True)
    assert written == read_settings(folder)
    assert len(written["target_modules"]) == count


def test_patterns_are_written_as_full_escaped_names(folder):
    settings = read_settings(rewrite(golden("patterns"), folder))
    q_proj = r"model\.layers\.{}\.self_attn\.q_proj"
    v_proj = r"model\.layers\.{}\.self_attn\.v_proj"
    assert settings["rank_pattern"] == {
        r"model\.layers\.0\.mlp\.down_proj": 2,
        q_proj.format(0): 4,
        q_proj.format(1): 4,
    }
    assert settings["alpha_pattern"] == {
        r"model\.layers\.1\.mlp\.gate_proj": 24,
        v_proj.format(0): 8,
        v_proj.format(1): 8,
    }


def test_settings_are_sorted_and_integral_alphas_plain(folder):
    rewrite(golden("basic"), folder)
    text = (folder / "adapter_config.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert '"lora_alpha": 32,' in text


def test_base_and_revision_are_kept(folder):
    case = golden("basic")
    _, _, params = case.load()
    config = read_adapter(case.folder).config
    write_adapter(params, config, folder, "owner/name", "abc")
    adapter = read_adapter(folder)
    assert (adapter.base_model_name_or_path, adapter.revision) == ("owner/name", "abc")


def test_writing_twice_gives_the_same_bytes(tmp_path):
    case = golden("patterns")
    first, second = (rewrite(case, tmp_path / name) for name in "ab")
    assert files(first) == files(second)


def test_an_existing_adapter_needs_overwrite(folder):
    rewrite(golden("basic"), folder)
    with pytest.raises(UsageError, match="not empty"):
        rewrite(golden("defaults"), folder)
    rewrite(golden("defaults"), folder, overwrite=True)
    assert read_settings(folder)["lora_alpha"] == 8


def test_a_tree_without_adapter_is_not_written(folder):
    _, base, _ = golden("basic").load()
    with pytest.raises(UsageError, match="nothing to write"):
        write_adapter(base, jlora.LoraConfig(), folder, None)


def test_new_adapter_of_add_lora_reads_back(folder):
    model, base, _ = golden("basic").load()
    config = jlora.LoraConfig(r=2, lora_alpha=3.5, target_modules=["up_proj"])
    params = jlora.add_lora(base, config, jax.random.key(0))
    write_adapter(params, config, folder, None)
    again = attach_adapter(base, model.config, folder)
    jax.tree.map(np.testing.assert_array_equal, params, again)


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
    checkpoints = RunCheckpoints(tmp_path / "checkpoints", 1)
    checkpoints.save(3, {"trainable": trainable}, {"settings": settings})
    checkpoints.close()
    if finished:
        write_adapter(trainable, expected.config, tmp_path / "adapter", "base")
    adapter = open_adapter(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, adapter.tensors, expected.tensors)
    assert adapter.scalings == expected.scalings
    assert adapter.base_model_name_or_path == "base"
    assert adapter.location == (tmp_path / "adapter" if finished else tmp_path)


# What is refused: settings of `basic`, changed.
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"bias": "all"},
        {"lora_bias": True},
        {"layer_replication": [[0, 1]]},
        {"target_parameters": ["weight"]},
        {"alora_invocation_tokens": [1]},
        {"arrow_config": {}},
        {"use_bdlora": True},
        {"velora_config": {}},
        {"kasa_config": {}},
        {"monteclora_config": {}},
        {"use_qalora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"peft_type": "IA3"},
        {"task_type": "SEQ_CLS"},
    ],
    ids=str,
)
def test_an_unsupported_setting_is_refused_by_name(settings, folder):
    changed_copy(folder, "basic", settings)
    [(key, value)] = settings.items()
    with pytest.raises(UnsupportedError) as caught:
        read_adapter(folder)
    assert f"{key}={value!r}" in str(caught.value)
    assert "with PEFT" in str(caught.value)


def test_all_unsupported_settings_are_named_at_once(folder):
    changed_copy(folder, "basic", {"use_dora": True, "bias": "all"})
    with pytest.raises(UnsupportedError, match="use_dora=True, bias='all'"):
        read_adapter(folder)


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "mica", "eva", False])
def test_a_start_that_leaves_the_base_alone_is_plain_lora(start, folder):
    changed_copy(folder, "basic", {"init_lora_weights": start})
    expected = read_adapter(GOLDEN / "basic")
    assert read_adapter(folder).config == expected.config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": None}, "no peft_type"),
        ({"r": 0}, "r=0"),
        ({"r": "8"}, "r='8' is not an integer"),
        ({"r": 8.5}, "r=8.5 is not an integer"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_alpha": True}, "lora_alpha=True is not a number"),
        ({"lora_dropout": 2}, "lora_dropout=2"),
        ({"target_modules": [1]}, "target_modules="),
        ({"target_modules": "(q_proj"}, "not a regular expression"),
        ({"target_modules": []}, "is empty"),
        ({"target_modules": r"model\.layers\.0"}, "not a linear layer"),
        ({"exclude_modules": {}}, "exclude_modules={}"),
        ({"layers_to_transform": "1"}, "layers_to_transform='1'"),
        ({"layers_pattern": "layers"}, "layers_pattern needs"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern="),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj=0"),
        ({"use_rslora": 1}, "use_rslora=1 is not true or false"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3"),
        ({"r": 4}, "q_proj has rank 8, the settings say 4"),
        ({"rank_pattern": {"v_proj": 2}}, "v_proj has rank 8, the settings say 2"),
    ],
    ids=str,
)
def test_damaged_settings_are_refused(settings, message, folder):
    changed_copy(folder, "basic", settings)
    with pytest.raises(CorruptError) as caught:
        check_fit(read_adapter(folder), config_of("untied_fp32"))
    assert message in str(caught.value)


def without(*keys):
    return lambda arrays: {k: v for k, v in arrays.items() if k not in keys}


def renamed(old, new):
    return lambda arrays: {k.replace(old, new): v for k, v in arrays.items()}


def with_more(*keys):
    return lambda arrays: arrays | dict.fromkeys(keys, arrays[A])


def with_value(key, make):
    return lambda arrays: arrays | {key: np.ascontiguousarray(make(arrays[key]))}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (without(A), f"{A} is missing"),
        (without(A, B), "selects model.layers.0.self_attn.q_proj, which has no"),
        (lambda arrays: {}, "no tensors"),
        (renamed("q_proj", "q_porj"), "no model.layers.0.self_attn.q_porj; did you"),
        (renamed("v_proj", "k_proj"), "does not select model.layers.0.self_attn.k"),
        (renamed("layers.1", "layers.2"), "the model has no model.layers.2.self"),
        (renamed("base_model.model.", ""), "not of the form base_model.model.model"),
        (with_more(f"{Q}.lora_C.weight"), f"did you mean '{B}'"),
        (with_more(f"{Q}.lora_magnitude_vector"), "not of the form"),
        (with_more(f"{Q}.weight"), "not of the form"),
        (with_more(f"{Q}.lora_A.default.weight"), "two tensors for"),
        (with_value(A, lambda a: a[:4]), "different ranks"),
        (with_value(A, lambda a: a[:, :9]), "[8, 9] instead of [8, 64]"),
        (with_value(B, lambda b: b[:9]), "[9, 8] instead of [64, 8]"),
        (with_value(B, lambda b: b[None]), "is not a matrix"),
        (with_value(A, lambda a: np.where(a == a.max(), np.nan, a)), f"{A}: nan at"),
        (with_value(B, lambda b: np.where(b == b.max(), np.inf, b)), f"{B}: inf at"),
    ],
)
def test_damaged_tensors_are_refused(arrays, message, folder):
    changed_copy(folder, "basic", arrays=arrays)
    with pytest.raises(CorruptError) as caught:
        check_fit(read_adapter(folder), config_of("untied_fp32"))
    assert message in str(caught.value)


def test_all_misfits_are_listed_at_once(folder):
    changed_copy(folder, "basic", {"target_modules": ["q_proj", "k_proj"]})
    with pytest.raises(CorruptError) as caught:
        check_fit(read_adapter(folder), config_of("untied_fp32"))
    assert str(caught.value).count("which has no tensors") == 2
    assert str(caught.value).count("does not select") == 2


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.embed_tokens.base_layer.weight",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
    ],
)
def test_tensors_of_the_tables_are_unsupported(key, folder):
    changed_copy(folder, "basic", arrays=with_more(key))
    with pytest.raises(UnsupportedError, match="embedding and the head") as caught:
        read_adapter(folder)
    assert key in str(caught.value)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_targeted_table_is_unsupported(target, folder):
    changed_copy(folder, "basic", {"target_modules": ["q_proj", "v_proj", target]})
    with pytest.raises(UnsupportedError, match=target):
        check_fit(read_adapter(folder), config_of("tied_fp32"))


@pytest.mark.parametrize(
    "spelling",
    [
        renamed(".weight", ".default.weight"),
        renamed("model.model", "model._orig_mod.model"),
    ],
)
def test_other_spellings_of_keys_are_read(spelling, folder):
    changed_copy(folder, "basic", arrays=spelling)
    expected = read_adapter(GOLDEN / "basic")
    jax.tree.map(
        np.testing.assert_array_equal, read_adapter(folder).tensors, expected.tensors
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_tensors_are_widened_exactly(dtype, folder):
    changed_copy(
        folder, "basic", arrays=lambda a: {k: v.astype(dtype) for k, v in a.items()}
    )
    expected = read_adapter(GOLDEN / "basic")  # on a grid that both dtypes hold
    jax.tree.map(
        np.testing.assert_array_equal, read_adapter(folder).tensors, expected.tensors
    )


def test_absent_keys_take_the_defaults_of_peft(folder):
    changed_copy(folder, "defaults")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    adapter = read_adapter(folder)
    check_fit(adapter, config_of("untied_fp32"))
    assert set(adapter.scalings.values()) == {1.0}


def test_an_unknown_key_is_dropped_with_a_warning(folder, capsys):
    changed_copy(folder, "basic", {"user_rslora": True})
    read_adapter(folder)
    expected = "unknown keys are ignored: user_rslora; did you mean 'use_rslora'?"
    assert expected in capsys.readouterr().err


def test_an_adapter_that_changes_nothing_is_a_warning(folder, capsys):
    changed_copy(
        folder,
        "basic",
        arrays=lambda a: {k: v * 0 if "lora_B" in k else v for k, v in a.items()},
    )
    read_adapter(folder)
    assert "every lora_B is zero" in capsys.readouterr().err


def test_a_good_adapter_gives_no_warning(capsys):
    adapter = read_adapter(GOLDEN / "patterns")
    check_fit(adapter, config_of("untied_fp32"))
    assert capsys.readouterr().err == ""


def test_a_pickled_adapter_is_refused_unopened(folder):
    changed_copy(folder, "basic")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match=r"pickle.*save_pretrained"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda f: None, UsageError, "no such folder"),
        (lambda f: f.mkdir(), UsageError, "neither adapter_config.json nor"),
        (lambda f: (f / "checkpoints").mkdir(parents=True), UsageError, "checkpoint"),
        (lambda f: changed_copy(f / "en", "basic"), UsageError, "its subfolder en"),
        (lambda f: no_weights(f), CorruptError, "without adapter_model.safetensors"),
        (lambda f: outside(f), CorruptError, "a link that leaves"),
    ],
)
def test_what_is_no_adapter_is_named(prepare, error, message, folder):
    prepare(folder)
    with pytest.raises(JloraError, match=message) as caught:
        open_adapter(folder)
    assert isinstance(caught.value, error)


def no_weights(folder: Path) -> None:
    changed_copy(folder, "basic")
    (folder / "adapter_model.safetensors").unlink()


def outside(folder: Path) -> None:
    no_weights(folder)
    target = GOLDEN / "basic" / "adapter_model.safetensors"
    (folder / "adapter_model.safetensors").symlink_to(target)


def test_an_adapter_of_a_larger_model_is_refused():
    _, params, _ = golden("basic").load()
    config = config_of("tied_fp32")
    adapter = read_adapter(GOLDEN / "basic")
    wide = Adapter.make(
        adapter.config,
        {
            path: {"lora_A": np.zeros((128, 8), np.float32), "lora_B": pair["lora_B"]}
            for path, pair in adapter.tensors.items()
        },
        Path("wide"),
        None,
    )
    with pytest.raises(CorruptError, match=r"\[8, 128\] instead of \[8, 64\]"):
        attach_adapter(params, config, wide)
