import json
import re
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.adapters import (
    CASES,
    GOLDEN,
    changed_copy,
    golden,
    tensors,
)

import convert
import jlora
from convert.to_peft import Arguments as ToPeft
from convert.to_peft import main as to_peft
from jlora.errors import CorruptError, JloraError, UnsupportedError, UsageError
from jlora.formats.open_model import open_model
from jlora.formats.peft.attach_adapter import (
    Adapter,
    attach_adapter,
    check_fit,
    read_adapter,
    write_adapter,
)
from jlora.loading import open_adapter
from jlora.lora.adapter_tree import module_at, split, trainable_mask
from jlora.train.checkpoint import RunCheckpoints

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
HEAD = "base_model.model.lm_head.weight"
TOKENS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.fixture(params=CASES)
def case(request):
    return golden(request.param)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "adapter"


def config_of(base):
    return open_model(str(GOLDEN / "_base" / base)).config


def read_settings(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(case, folder, **kwargs):
    _, _, params = case.load()
    config = read_adapter(case.folder).config
    write_adapter(params, config, folder, "base", **kwargs)
    return folder


# Written back as plain LoRA on another base, and with tables of its own.
REWRITTEN = [n for n in CASES if n not in ("pissa", "olora", "resized_vocab")]


@pytest.fixture(params=REWRITTEN)
def rewritten(request):
    return golden(request.param)


def kept(leaves):
    """The leaves that are written: not PEFT's copies of the base's tables."""
    return {k: v for k, v in leaves.items() if k not in ("kernel", "embedding")}


def test_attached_leaves_share_the_base():
    _, base, params = golden("basic").load()
    name = "model.layers.0.self_attn.q_proj"
    assert module_at(params, name)["kernel"] is module_at(base, name)["kernel"]
    assert "lora_A" not in module_at(base, name)


def test_written_adapter_reads_back_equal(rewritten, folder):
    before = read_adapter(rewritten.folder)
    after = read_adapter(rewrite(rewritten, folder))
    assert before.tensors.keys() == after.tensors.keys()
    for path, leaves in before.tensors.items():
        jax.tree.map(np.testing.assert_array_equal, kept(leaves), after.tensors[path])
    assert before.scalings == after.scalings
    fields = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias")
    for field in fields:
        assert getattr(before.config, field) == getattr(after.config, field)
    check_fit(after, open_model(str(rewritten.base)).config)


def test_written_tensors_are_those_of_peft(rewritten, folder):
    expected = {
        key: value
        for key, value in tensors(rewritten.folder).items()
        if not key.endswith("base_layer.weight")
    }
    written = tensors(rewrite(rewritten, folder))
    assert written.keys() == expected.keys()
    for key, value in written.items():
        np.testing.assert_array_equal(value, expected[key].astype(value.dtype))
        assert value.dtype == np.float32 or ".lora_" not in key


def test_written_keys_are_the_oldest_and_those_that_say_more(rewritten, folder):
    keys = read_settings(rewrite(rewritten, folder)).keys()
    config = read_adapter(rewritten.folder).config
    newer = ("use_rslora", "use_dora", "ensure_weight_tying", "trainable_token_indices")
    assert keys == OLDEST_KEYS | {key for key in newer if getattr(config, key)}


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
    config = replace(config, base_model_name_or_path="owner/name", revision="abc")
    write_adapter(params, config, folder)
    adapter = read_adapter(folder)
    assert adapter.config.base_model_name_or_path == "owner/name"
    assert adapter.config.revision == "abc"


def test_the_revision_of_a_hub_id_is_written_apart(folder):
    case = golden("basic")
    _, _, params = case.load()
    write_adapter(params, read_adapter(case.folder).config, folder, "owner/name@abc")
    settings = read_settings(folder)
    assert settings["base_model_name_or_path"] == "owner/name"
    assert settings["revision"] == "abc"


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
    again = attach_adapter(base, model.config, read_adapter(folder))
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
    assert adapter.config.base_model_name_or_path == "base"
    assert adapter.location == (tmp_path / "adapter" if finished else tmp_path)


# What is refused: settings of `basic`, changed.
@pytest.mark.parametrize(
    "settings",
    [
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
        {"init_lora_weights": "pissa_niter_4"},
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
    changed_copy(folder, "basic", {"lora_bias": True, "use_qalora": True})
    with pytest.raises(UnsupportedError, match=r"lora_bias=True .*, use_qalora=True"):
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
        (with_more(f"{Q}.lora_magnitude_vector"), "[8, 64] is not a vector"),
        (
            lambda a: a | {f"{Q}.lora_magnitude_vector": a[A][0]},
            f"{Q}.lora_magnitude_vector is not among what the settings select",
        ),
        (with_more(f"{Q}.weight"), f"{Q}.weight: weights of the base"),
        (with_more(f"{Q}.base_layer.weight"), "weights of the base"),
        (with_more("base_model.model.model.norm.weight"), "is not a vector"),
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
    ("name", "settings", "arrays", "message"),
    [
        ("dora", {}, without(f"{Q}.lora_magnitude_vector"), "vector is missing"),
        ("dora", {"use_dora": False}, None, "vector is not among what the settings"),
        ("modules_to_save", {}, without(HEAD), f"{HEAD} is missing"),
        ("modules_to_save", {"modules_to_save": ["lm_head"]}, None, "weights of the b"),
        ("modules_to_save", {}, with_value(HEAD, lambda h: h[1:]), "[79, 64] instead"),
        ("resized_vocab", {}, without(HEAD), f"84 tokens, the base's 80, and {HEAD}"),
        ("trainable_tokens", {}, without(TOKENS), f"{TOKENS} is missing"),
        ("trainable_tokens", {"trainable_token_indices": [1, 5]}, None, "[3, 64] inst"),
        (
            "trainable_tokens",
            {"trainable_token_indices": [1, 5, 5]},
            None,
            "5 is given twice",
        ),
        (
            "trainable_tokens",
            {"trainable_token_indices": [1, 5, 80]},
            None,
            "not in 0.",
        ),
        (
            "trainable_tokens",
            {"trainable_token_indices": {"norm": [1]}},
            None,
            "not a table",
        ),
        (
            "embed",
            {"trainable_token_indices": [1]},
            None,
            "target_modules or modules_to_save has already",
        ),
        ("embed", {"target_modules": ["q_proj"]}, None, "select model.embed_tokens"),
        (
            "basic",
            {"target_modules": ["q_proj", "v_proj", "lm_head"]},
            None,
            "selects lm_head, which has no tensors",
        ),
        ("basic", {"init_lora_weights": "magic"}, None, "not known to PEFT"),
    ],
)
def test_tensors_and_settings_that_disagree_are_refused(
    name, settings, arrays, message, folder
):
    changed_copy(folder, name, settings, arrays)
    with pytest.raises(CorruptError) as caught:
        check_fit(read_adapter(folder), config_of("untied_fp32"))
    assert message in str(caught.value)


def test_a_table_of_the_old_size_that_differs_is_refused(folder):
    table = np.ones((80, 64), np.float32)
    changed_copy(folder, "basic", arrays=lambda a: a | {HEAD: table})
    model, base, _ = golden("basic").load()
    with pytest.raises(CorruptError, match=r"lm_head\.weight differs from the base"):
        attach_adapter(base, model.config, read_adapter(folder))


def test_a_copy_of_the_bases_table_changes_nothing(folder):
    model, base, expected = golden("basic").load()
    copy = np.asarray(base["lm_head"]["kernel"]).T.copy()
    changed_copy(folder, "basic", arrays=lambda a: a | {HEAD: copy})
    found = attach_adapter(base, model.config, read_adapter(folder))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


TABLE = re.compile(r"(embed_tokens|lm_head)\.weight")
EMBED = "base_model.model.model.embed_tokens"
RESIZED: dict[str, tuple[dict[str, Any], Any]] = {
    # How PEFT writes the two tables of a resized vocabulary, beside `resized_vocab`.
    "adapted": (
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        lambda a: {
            **{TABLE.sub(r"\1.base_layer.weight", key): v for key, v in a.items()},
            f"{EMBED}.lora_embedding_A": np.zeros((4, 84), np.float32),
            f"{EMBED}.lora_embedding_B": np.ones((64, 4), np.float32),
            "base_model.model.lm_head.lora_A.weight": np.ones((4, 64), np.float32),
            "base_model.model.lm_head.lora_B.weight": np.zeros((84, 4), np.float32),
        },
    ),
    "saved": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        lambda a: {
            **a,
            **{TABLE.sub(r"\1.modules_to_save.weight", key): v for key, v in a.items()},
            **{
                TABLE.sub(r"\1.original_module.weight", key): -v
                for key, v in a.items()
                if TABLE.search(key)
            },
        },
    ),
    "one saved": (
        {"modules_to_save": ["lm_head"]},
        lambda a: {**a, HEAD.replace("head.", "head.original_module."): -a[HEAD]},
    ),
    "saved, without the originals": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        None,
    ),
}


@pytest.mark.parametrize("kind", RESIZED)
def test_a_resized_vocabulary_is_read_in_every_form_of_peft(kind, folder):
    case = golden("resized_vocab")
    changed_copy(folder, "resized_vocab", *RESIZED[kind])
    model, params = convert.load(str(case.base), adapter=str(folder))
    logits = np.asarray(model.apply({"params": params}, case.tokens))
    np.testing.assert_allclose(logits, case.expected["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "key", "of"),
    [
        ("saved", f"{EMBED}.modules_to_save.weight", f"{EMBED}.weight"),
        ("adapted", f"{EMBED}.weight", f"{EMBED}.base_layer.weight"),
    ],
)
def test_two_tensors_for_one_purpose_must_be_equal(kind, key, of, tmp_path):
    settings, make = RESIZED[kind]

    def read_with(factor):
        def arrays(found):
            return {**make(found), key: factor * make(found)[of]}

        folder = tmp_path / str(factor)
        return read_adapter(changed_copy(folder, "resized_vocab", settings, arrays))

    read_with(1)
    with pytest.raises(CorruptError, match=r"embed_tokens/.*embedding, and differ"):
        read_with(2)


@pytest.mark.parametrize("kind", ["adapted", "saved"])
def test_tables_of_a_resized_vocabulary_are_written_where_the_base_tells(
    kind, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(GOLDEN)
    changed_copy(folder, "resized_vocab", *RESIZED[kind])
    to_peft(ToPeft(out=str(tmp_path / "out"), adapter=str(folder)))
    kept = {k for k in tensors(folder) if ".modules_to_save." not in k}
    assert tensors(tmp_path / "out").keys() == kept


def test_trained_biases_are_not_trained_on():
    case = golden("bias_all")
    model, base, _ = case.load()
    with pytest.raises(UnsupportedError, match=r"bias_all: bias='all'.*to_hf"):
        attach_adapter(base, model.config, read_adapter(case.folder), train=True)


def test_a_resized_vocabulary_is_not_trained_on():
    case = golden("resized_vocab")
    _, base, _ = case.load()
    config = config_of("untied_fp32")
    with pytest.raises(UnsupportedError, match=r"84 tokens, the base has 80.*to_hf"):
        attach_adapter(base, config, read_adapter(case.folder), train=True)


def test_a_different_table_of_an_adapted_embedding_replaces_the_bases(folder, capsys):
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    changed_copy(folder, "embed", arrays=with_value(key, lambda e: 2 * e))
    model, base, _ = golden("embed").load()
    found = attach_adapter(base, model.config, read_adapter(folder))
    table = 2 * base["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(found["embed_tokens"]["embedding"], table)
    assert "replaces a different base's" in capsys.readouterr().err


def test_two_pairs_under_one_tie_are_used_as_two(folder, capsys):
    key = "base_model.model.lm_head.lora_B.weight"
    changed_copy(folder, "tied_embed_ensured", arrays=with_value(key, lambda b: 2 * b))
    model, base, _ = golden("tied_embed_ensured").load()
    found = attach_adapter(base, model.config, read_adapter(folder))
    assert "lora_shared" not in found["lm_head"]
    assert "they are used as two" in capsys.readouterr().err


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
    )
    with pytest.raises(CorruptError, match=r"\[8, 128\] instead of \[8, 64\]"):
        attach_adapter(params, config, wide)


@pytest.mark.parametrize("revision", [None, "abc"])
def test_an_adapter_may_be_named_by_its_hub_id(revision, monkeypatch):
    asked = {}

    def snapshot_download(repository, **options):
        asked.update(options, repository=repository)
        return str(GOLDEN / "basic")

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    name = "owner/adapter" if revision is None else f"owner/adapter@{revision}"
    assert open_adapter(name).config == read_adapter(GOLDEN / "basic").config
    assert (asked["repository"], asked["revision"]) == ("owner/adapter", revision)
    assert all("adapter_" in pattern for pattern in asked["allow_patterns"])


def test_a_loaded_adapter_drops_out_where_a_key_is_given(folder):
    case = golden("basic")
    changed_copy(folder, "basic", {"lora_dropout": 0.5})
    model, params = convert.load(str(case.base), adapter=str(folder))
    quiet = np.asarray(model.apply({"params": params}, case.tokens))
    np.testing.assert_allclose(quiet, case.expected["logits"], rtol=0, atol=1e-4)
    key = {"dropout": jax.random.key(0)}
    noisy = np.asarray(model.apply({"params": params}, case.tokens, rngs=key))
    assert np.abs(noisy - quiet).max() > 0.1
