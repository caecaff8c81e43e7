"""Sampling's settings against Transformers' own processors, made by its `generate`."""

import numpy as np
import pytest
from helpers.sampling_cases import CASES, logits_and_texts, probabilities
from processors import probabilities_of_transformers


@pytest.mark.parametrize("name", CASES)
def test_probabilities_after_each_step_equal_transformers(name):
    logits, texts = logits_and_texts()
    expected = probabilities_of_transformers(logits, texts, CASES[name])
    found = probabilities(logits, texts, CASES[name])
    # Those that change nothing have no processor in one or the other.
    assert [step for step in found if step in expected] == list(expected)
    for step, values in expected.items():
        np.testing.assert_allclose(found[step], values, rtol=0, atol=1e-6)
