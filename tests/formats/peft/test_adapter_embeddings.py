import re
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from helpers.adapters import GOLDEN, HEAD, changed_copy, golden, tensors, with_value

import convert
from convert.to_peft import Arguments as ToPeft
from convert.to_peft import main as to_peft
from jlora.errors import CorruptError
from jlora.formats.peft.adapter_reader import read_adapter
from jlora.formats.peft.attach_adapter import attach_adapter

WEIGHT_KEY = re.compile(r"(embed_tokens|lm_head)\.weight")


EMBED = "base_model.model.model.embed_tokens"


RESIZED: dict[str, tuple[dict[str, Any], Any]] = {
    # How PEFT writes the two tables of a resized vocabulary, beside `resized_vocab`.
    "adapted": (
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        lambda a: {
            **{WEIGHT_KEY.sub(r"\1.base_layer.weight", key): v for key, v in a.items()},
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
            **{
                WEIGHT_KEY.sub(r"\1.modules_to_save.weight", key): v
                for key, v in a.items()
            },
            **{
                WEIGHT_KEY.sub(r"\1.original_module.weight", key): -v
                for key, v in a.items()
                if WEIGHT_KEY.search(key)
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
def test_two_tensors_for_one_leaf_must_be_equal(kind, key, of, tmp_path):
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
def test_embeddings_of_a_resized_vocabulary_are_written(
    kind, folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(GOLDEN)
    changed_copy(folder, "resized_vocab", *RESIZED[kind])
    to_peft(ToPeft(out=str(tmp_path / "out"), adapter=str(folder)))
    kept = {k for k in tensors(folder) if ".modules_to_save." not in k}
    assert tensors(tmp_path / "out").keys() == kept


def test_an_untrained_embedding_that_differs_is_refused(folder):
    ones = np.ones((80, 64), np.float32)
    changed_copy(folder, "basic", arrays=lambda a: a | {HEAD: ones})
    model, base, _ = golden("basic").load()
    with pytest.raises(CorruptError, match=r"lm_head\.weight differs from the base"):
        attach_adapter(base, model.config, read_adapter(folder))


def test_a_copy_of_the_bases_embedding_changes_nothing(folder):
    model, base, expected = golden("basic").load()
    copy = np.asarray(base["lm_head"]["kernel"]).T.copy()
    changed_copy(folder, "basic", arrays=lambda a: a | {HEAD: copy})
    found = attach_adapter(base, model.config, read_adapter(folder))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_different_copy_of_an_adapted_embedding_replaces_the_bases(folder, capsys):
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    changed_copy(folder, "embed", arrays=with_value(key, lambda e: 2 * e))
    model, base, _ = golden("embed").load()
    found = attach_adapter(base, model.config, read_adapter(folder))
    doubled = 2 * base["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(found["embed_tokens"]["embedding"], doubled)
    assert "replaces a different base's" in capsys.readouterr().err


def test_a_different_copy_of_an_adapted_embedding_is_exported(
    folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(GOLDEN)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    for name, factor in (("same", 1), ("other", 2)):
        copy = changed_copy(
            folder / name, "embed", arrays=with_value(key, partial(np.multiply, factor))
        )
        to_peft(ToPeft(out=str(tmp_path / name), adapter=str(copy)))
    assert key not in tensors(tmp_path / "same")
    written = tensors(tmp_path / "other")[key]
    np.testing.assert_array_equal(written, tensors(folder / "other")[key])
