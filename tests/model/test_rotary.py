import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN, reference

import convert
from jlora.config.llama_config import LlamaConfig
from jlora.errors import CorruptError, UsageError
from jlora.formats.load_params import load_params
from jlora.formats.open_model import open_model
from jlora.model.generation import generate_tokens
from jlora.model.llama import Llama
from jlora.model.rotary import apply_rope, rope_angles, rope_frequencies

# Made by tests/golden/make_rope_golden.py with Transformers.
GOLDEN = GOLDEN / "rope"
DOCUMENT = json.loads((GOLDEN / "cases.json").read_text())
CASES, THETA = DOCUMENT["cases"], DOCUMENT["theta"]
with np.load(GOLDEN / "expected.npz") as file:
    EXPECTED = dict(file)
LENGTHS = sorted({int(k.split()[-1]) for k in EXPECTED if k.startswith("logits")})
PLAIN = json.loads((GOLDEN / "config.json").read_text())
TYPES = ("linear", "dynamic", "llama3", "yarn", "longrope")


def v5(settings, theta=THETA):
    return {"rope_parameters": {"rope_theta": theta, **settings}}


def v4(settings, theta=THETA, type_key="rope_type"):
    scaling = {(type_key if k == "rope_type" else k): v for k, v in settings.items()}
    return {"rope_parameters": None, "rope_theta": theta, "rope_scaling": scaling}


def make(changes):
    return LlamaConfig.from_hf(PLAIN | changes)


def apply(model: Any, params, tokens) -> np.ndarray:
    return np.asarray(model.apply({"params": params}, jnp.asarray(tokens)))


@pytest.fixture(scope="module")
def params():
    return load_params(open_model(str(GOLDEN)), dtype="float32")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, length, params):
    tokens = EXPECTED["tokens"][:, :length]
    logits = apply(Llama(make(v5(CASES[name]))), params, tokens)
    expected = EXPECTED[f"logits {name} {length}"]
    # Both sum in float32, in another order: measured 1e-5 at most.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if name != "default"])
def test_each_case_changes_the_logits_beyond_the_original_context(name):
    length = LENGTHS[-1]
    plain, scaled = (EXPECTED[f"logits {n} {length}"] for n in ("default", name))
    assert np.abs(plain - scaled).max() > 0.01


@pytest.mark.parametrize("i", range(len(DOCUMENT["sizes"])))
def test_frequencies_of_real_sizes_equal_transformers(i):
    case = DOCUMENT["sizes"][i]
    head_dim, theta, positions, _ = case["size"]
    sizes = {"head_dim": head_dim, "max_position_embeddings": positions}
    config = make(sizes | v5(case["settings"], theta))
    frequencies = rope_frequencies(config, case["length"])
    assert frequencies.dtype == np.float32
    # Three units in the last place of float32: the difference of two powers.
    np.testing.assert_allclose(
        frequencies, EXPECTED[f"frequencies {i}"], rtol=3.2e-7, atol=0
    )
    attention = config.rope_parameters.attention_factor
    assert attention == pytest.approx(float(EXPECTED[f"attention {i}"]), rel=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_the_reference_in_float64(name, length):
    config = PLAIN | v5(CASES[name])
    found = rope_frequencies(make(v5(CASES[name])), length)
    # The exponent is float32 as in HF: half a unit of it, times log(theta), is 6e-7.
    np.testing.assert_allclose(
        found, reference.rope_frequencies(config, length), rtol=1e-6, atol=0
    )
    assert make(v5(CASES[name])).rope_parameters.attention_factor == pytest.approx(
        reference.rope_scale(config)
    )


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize("name", CASES)
def test_v4_and_v5_layouts_mean_the_same(name, type_key):
    assert make(v4(CASES[name], type_key=type_key)) == make(v5(CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_settings_repeated_in_both_places_are_accepted(name):
    both = v4(CASES[name]) | v5(CASES[name])
    assert make(both) == make(v5(CASES[name]))


@pytest.mark.parametrize("name", TYPES)
def test_settings_that_differ_between_the_places_are_refused(name):
    both = v4(CASES[name]) | v5(CASES[name] | {"factor": 3.5})
    with pytest.raises(CorruptError, match="differ in factor"):
        make(both)


@pytest.mark.parametrize("kind", ["yarn", "longrope", "llama3"])
def test_the_original_context_at_the_top_level_is_used(kind):
    inner = {k: v for k, v in CASES[kind].items() if not k.startswith("original")}
    outer = v5(inner) | {"original_max_position_embeddings": 32}
    assert make(outer) == make(v5(CASES[kind]))


@pytest.mark.parametrize("kind", ["yarn", "longrope", "llama3"])
def test_the_original_context_given_twice_must_agree(kind):
    with pytest.raises(CorruptError, match="48 at the top and 32 in the rope"):
        make(v5(CASES[kind]) | {"original_max_position_embeddings": 48})


@pytest.mark.parametrize("kind", ["yarn", "longrope"])
def test_an_absent_original_context_means_all_positions(kind):
    inner = {k: v for k, v in CASES[kind].items() if not k.startswith("original")}
    rope = make(v5(inner)).rope_parameters
    assert rope.original_max_position_embeddings == PLAIN["max_position_embeddings"]


def test_an_absent_original_context_of_llama3_is_refused():
    inner = {k: v for k, v in CASES["llama3"].items() if not k.startswith("original")}
    with pytest.raises(CorruptError, match=r"llama3.*original_max_position_embed"):
        make(v5(inner))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        *((kind, {"factor": None}, "factor=None") for kind in ("linear", "dynamic")),
        *((kind, {"factor": 0.5}, r"factor=0.5, .*at least 1") for kind in TYPES),
        *((kind, {"factor": "4"}, "factor='4'") for kind in TYPES),
        *((kind, {"factor": True}, "factor=True") for kind in TYPES),
        ("yarn", {"beta_fast": 0.1}, "beta_fast=0.1"),
        ("yarn", {"beta_slow": "x"}, "beta_slow='x'"),
        ("yarn", {"truncate": 0}, "truncate=0"),
        ("yarn", {"attention_factor": -1}, "attention_factor=-1"),
        ("yarn", {"mscale": [1]}, "mscale"),
        ("yarn", {"original_max_position_embeddings": 0}, "original_max"),
        (
            "yarn",
            {"factor": None, "original_max_position_embeddings": 10**6},
            r"factor is null, .*/ 1000000, expected at least 1",
        ),
        ("longrope", {"short_factor": None}, "short_factor=None.*8 numbers"),
        ("longrope", {"long_factor": [1.0] * 7}, "a list of 7.*8 numbers"),
        ("longrope", {"long_factor": [1.0] * 7 + [0]}, "long_factor"),
        ("longrope", {"short_factor": [1.0] * 7 + ["1"]}, "short_factor"),
        ("longrope", {"original_max_position_embeddings": 1}, "at least 2"),
    ],
)
def test_a_wrong_value_is_named_with_its_type(kind, changes, words):
    with pytest.raises(CorruptError, match=f"'{kind}': .*{words}"):
        make(v5(CASES[kind] | changes))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_an_absent_factor_is_named_with_its_type(kind):
    settings = {k: v for k, v in CASES[kind].items() if k != "factor"}
    with pytest.raises(CorruptError, match=f"'{kind}': factor"):
        make(v5(settings))


def test_all_problems_of_the_settings_are_told_at_once():
    settings: dict[str, Any] = {"rope_type": "yarn", "factor": 0, "beta_fast": "a"}
    with pytest.raises(CorruptError) as error:
        make(v5(settings) | {"vocab_size": "20"})
    for part in ("vocab_size='20'", "factor=0", "beta_fast='a'"):
        assert part in str(error.value)


def test_angles_are_computed_once_for_all_layers():
    def turn(x, positions):
        cos, sin = rope_angles(make({}), positions, 8, "cpu")
        for _ in range(3):
            x = jnp.cumsum(apply_rope(x, cos, sin), axis=1)  # not one fusion
        return x

    x = jnp.ones((1, 8, 4, make({}).head_dim))
    program = jax.jit(turn).lower(x, jnp.arange(8)[None]).compile().as_text() or ""
    assert program.count(" cosine(") == 1


def test_dynamic_is_default_up_to_the_models_positions():
    dynamic, plain = make(v5(CASES["dynamic"])), make(v5(CASES["default"]))
    limit = PLAIN["max_position_embeddings"]
    expected = rope_frequencies(plain, limit)
    np.testing.assert_array_equal(rope_frequencies(dynamic, limit), expected)
    assert rope_frequencies(dynamic, limit + 1)[-1] < expected[-1]


@pytest.mark.parametrize(("length", "is_long"), [(32, False), (33, True)])
def test_longrope_turns_long_right_after_the_original_context(length, is_long):
    settings = CASES["longrope"]
    scales = np.float32(settings["long_factor" if is_long else "short_factor"])
    plain = rope_frequencies(make(v5(CASES["default"])), length)
    found = rope_frequencies(make(v5(settings)), length)
    np.testing.assert_allclose(found, plain / scales, rtol=3e-7)


@pytest.mark.parametrize(
    ("name", "needed"), [("longrope", 30), ("longrope", 40), ("dynamic", 64)]
)
def test_generated_tokens_are_those_of_the_whole_text(name, needed, params):
    # Within 32 positions all keys are turned by the short factors, beyond by the long
    # ones, from the first token on: what a call on the whole text does.
    model = Llama(make(v5(CASES[name])))
    prompt = EXPECTED["tokens"][0, :20].tolist()
    new = list(
        generate_tokens(model, params, prompt, max_new_tokens=needed - len(prompt))
    )
    logits = apply(model, params, [prompt + new])
    assert new == np.argmax(logits[0, len(prompt) - 1 : -1], axis=-1).tolist()


@pytest.mark.parametrize("name", ["default", *TYPES])
def test_generation_past_the_models_positions_is_refused(name, params):
    model = Llama(make(v5(CASES[name])))
    with pytest.raises(UsageError, match="max_position_embeddings=64"):
        next(generate_tokens(model, params, [1] * 60, max_new_tokens=5))


@pytest.mark.parametrize("name", ["default", *TYPES])
def test_rows_past_the_models_positions_are_refused(name):
    with pytest.raises(UsageError, match="seq_len=65 exceeds"):
        make(v5(CASES[name])).check_length(65, "seq_len")


def test_a_folder_with_scaling_loads_as_such(tmp_path):
    for path in GOLDEN.glob("*.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = PLAIN | v4(CASES["yarn"])
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model, params = convert.load(str(tmp_path))
    logits = apply(model, params, EXPECTED["tokens"])
    expected = EXPECTED[f"logits yarn {LENGTHS[-1]}"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
