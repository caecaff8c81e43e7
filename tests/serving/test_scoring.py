import jax
import numpy as np
import pytest
from helpers.training_cases import adapted_params, llama_config, logits_of

from jlora.loading import TextModel
from jlora.model.llama import Llama
from jlora.serving.scoring import padded_length, score


@pytest.fixture(scope="module")
def loaded() -> TextModel:
    config = llama_config(num_hidden_layers=1)
    model = Llama(config)
    return TextModel(model, adapted_params(config), None)  # type: ignore[arg-type]


def direct(
    loaded: TextModel, before: list[int], after: list[int]
) -> tuple[float, bool]:
    """The same from the logits of the tokens alone, without padding or a batch."""
    tokens = np.array([before + after], np.int32)
    logits = logits_of(loaded.model, loaded.params, jax.numpy.asarray(tokens))[0]
    exact = logits.astype(np.float64)
    log_probs = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    places = range(len(before) - 1, len(before) + len(after) - 1)
    total = sum(log_probs[i, t] for i, t in zip(places, after, strict=True))
    return total, all(
        exact[i].argmax() == t for i, t in zip(places, after, strict=True)
    )


def test_a_score_is_that_of_the_tokens_alone_whatever_is_scored_with_it(loaded):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 56, a).tolist(), rng.integers(0, 56, b).tolist())
        for a, b in ((1, 1), (3, 5), (40, 2), (1, 70), (20, 12), (2, 2), (9, 1))
    ]
    greedy = [
        int(
            logits_of(loaded.model, loaded.params, jax.numpy.array([[5, 6]]))[
                0, -1
            ].argmax()
        )
    ]
    pairs.append(([5, 6], greedy))
    found = score(loaded, pairs, batch_size=3)
    expected = [direct(loaded, *pair) for pair in pairs]
    assert [each.is_greedy for each in found] == [each[1] for each in expected]
    assert found[-1].is_greedy
    assert [each.log_likelihood for each in found] == pytest.approx(
        [each[0] for each in expected], abs=2e-4
    )


def test_rows_have_few_lengths():
    assert {padded_length(n) for n in range(1, 129)} == {32, 48, 64, 96, 128}
    assert all(n <= padded_length(n) < 1.5 * n for n in range(33, 5000))


def test_nothing_to_score_is_no_error(loaded):
    assert score(loaded, [], batch_size=4) == []
