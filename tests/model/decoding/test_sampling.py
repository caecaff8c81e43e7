import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GOLDEN
from helpers.sampling_cases import CASES, occurred, probabilities

from jlora.config.sampling_config import SamplingConfig
from jlora.errors import UsageError
from jlora.model.decoding.sampling import Settings, choose_tokens

EXPECTED = dict(np.load(GOLDEN / "sampling" / "expected.npz"))


@pytest.mark.parametrize("name", CASES)
def test_probabilities_after_each_step_are_those_of_transformers(name):
    found = probabilities(EXPECTED["logits"], EXPECTED["texts"], CASES[name])
    steps = [key.partition(".")[2] for key in EXPECTED if key.startswith(f"{name}.")]
    assert len(steps) >= 1
    for step in steps:
        expected = EXPECTED[f"{name}.{step}"]
        np.testing.assert_allclose(found[step], expected, rtol=0, atol=1e-6)
        assert np.array_equal(found[step] == 0, expected == 0)


def test_rows_have_settings_of_their_own():
    logits = jnp.asarray(EXPECTED["logits"])
    cases = [
        SamplingConfig(temperature=0.3, top_k=3),
        SamplingConfig(),
        SamplingConfig(temperature=1.0, top_p=0.5, repetition_penalty=1.5),
        SamplingConfig(temperature=2.0, min_p=0.1),
        SamplingConfig(repetition_penalty=2.0),
    ]
    steps = frozenset().union(*(case.steps for case in cases))
    keys = jax.random.split(jax.random.key(0), 5)
    seen = occurred(EXPECTED["texts"], logits.shape[1])
    together = choose_tokens(logits, Settings.of(cases), keys, seen, steps)
    alone = [
        int(
            choose_tokens(
                logits[i : i + 1],
                Settings.of([case]),
                keys[i : i + 1],
                seen[i : i + 1],
                case.steps,
            )[0]
        )
        for i, case in enumerate(cases)
    ]
    assert together.tolist() == alone
    assert alone[1] == int(jnp.argmax(logits[1]))


def test_what_is_drawn_has_the_probabilities():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    case = SamplingConfig(temperature=1.0, top_k=3)
    count = 4000
    drawn = choose_tokens(
        jnp.repeat(logits, count, 0),
        Settings.of([case] * count),
        jax.random.split(jax.random.key(1), count),
        None,
        case.steps,
    )
    shares = np.bincount(np.asarray(drawn), minlength=4) / count
    expected = np.array([0.5, 0.3, 0.15, 0]) / 0.95
    assert shares[3] == 0
    # Four standard deviations of a share of 4,000.
    np.testing.assert_allclose(shares, expected, rtol=0, atol=0.032)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0; expected 0, or from 1e-6"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1; expected at least 0"),
        ({"top_p": 0.0}, "top_p=0.0; expected above 0, at most 1"),
        ({"min_p": 1.5}, "min_p=1.5; expected from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0; expected above 0"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named(settings, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        SamplingConfig(**settings)


def test_without_a_temperature_only_the_penalty_matters():
    assert SamplingConfig(top_k=5, top_p=0.5, min_p=0.1).steps == frozenset()
    assert SamplingConfig(repetition_penalty=1.1).steps == {"repetition_penalty"}
