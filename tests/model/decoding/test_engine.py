from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.training_cases import (
    ALL_LINEAR,
    adapted_params,
    llama_config,
    random_params,
)

from jlora.config.sampling_config import SamplingConfig
from jlora.lora.adapter_tree import is_adapter, map_leaves, modules
from jlora.lora.merging import merge
from jlora.model.decoding.decoding_weights import decoding_weights
from jlora.model.decoding.engine import (
    Row,
    advance,
    cache_size,
    rounded_up,
    start,
    steps_of,
)
from jlora.model.decoding.token_rows import Generation, KeptCache, sample_key
from jlora.model.llama import Llama

CONFIG = replace(llama_config(), max_position_embeddings=512)
PROMPTS = [[5, 7, 9], list(range(1, 21)), [3]]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def rows(sampling=SamplingConfig(), prompts=PROMPTS):  # noqa: B008
    keys = [sample_key(0, i) for i in range(len(prompts))]
    return [Row(p, sampling, k) for p, k in zip(prompts, keys, strict=True)]


def tokens_of(params, given, counts, *, stop_ids=frozenset(), platform="cpu", **more):
    model = Llama(CONFIG, platform=platform)
    found = [[] for _ in given]
    for new in Generation(model, params, given, counts, stop_ids, **more):
        for own, tokens in zip(found, new, strict=True):
            own += tokens
    return found


def logits_of(params, tokens):
    found: Any = Llama(CONFIG).apply({"params": params}, tokens)
    return found


LIKELY = jax.jit(lambda params, text: jnp.argmax(logits_of(params, text), -1))


def greedy(params, prompt, count):
    text = list(prompt)
    for _ in range(count):
        padded = jnp.asarray([text + [0] * (64 - len(text))])
        text.append(int(LIKELY(params, padded)[0, len(text) - 1]))
    return text[len(prompt) :]


# A GPU computes many steps in one call, which a CPU can do as well.
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_rows_together_give_the_tokens_of_the_full_pass(params, platform):
    found = tokens_of(params, rows(), [20, 3, 9], platform=platform)
    expected = [
        greedy(params, prompt, count)
        for prompt, count in zip(PROMPTS, [20, 3, 9], strict=True)
    ]
    assert found == expected


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_row_ends_before_its_stop_id(params, platform):
    [whole] = tokens_of(params, rows(prompts=PROMPTS[:1]), [20])
    stop = whole[4]
    found = tokens_of(
        params, rows(), [20] * 3, stop_ids=frozenset([stop]), platform=platform
    )
    assert found[0] == whole[: whole.index(stop)]
    assert all(stop not in tokens for tokens in found)


def test_what_is_drawn_does_not_depend_on_the_other_rows_or_on_the_calls(params):
    sampling = SamplingConfig(temperature=1.5, top_k=30, top_p=0.95)
    given = rows(sampling)
    together = tokens_of(params, given, [20] * 3)
    assert tokens_of(params, given, [20] * 3, platform="gpu") == together
    for row, expected in zip(given, together, strict=True):
        assert tokens_of(params, [row], [20]) == [expected]
    assert len({tuple(tokens) for tokens in together}) == 3


def test_a_penalty_counts_prompt_and_text(params):
    [plain] = tokens_of(params, rows(prompts=[[5, 7]]), [30])
    huge = SamplingConfig(repetition_penalty=1e6)
    [found] = tokens_of(params, rows(huge, prompts=[[5, 7]]), [30])
    assert len(set(plain)) < 30
    # Logits that are divided by so much are above the negative ones.
    assert found != plain


def test_a_kept_cache_gives_the_same_tokens_as_a_new_one(params):
    kept = KeptCache(least=128)
    [first] = tokens_of(params, rows(prompts=[PROMPTS[1]]), [9], kept=kept)
    longer = [*PROMPTS[1], *first, 11, 12]
    assert kept.take(longer, 128)[1] >= len(PROMPTS[1]) + 8
    tokens_of(params, rows(prompts=[PROMPTS[1]]), [9], kept=kept)
    second = tokens_of(params, rows(prompts=[longer]), [9], kept=kept)
    assert second == [greedy(params, longer, 9)]
    changed = [*PROMPTS[1][:7], 2, 2, 2]
    third = tokens_of(params, rows(prompts=[changed]), [9], kept=kept)
    assert third == [greedy(params, changed, 9)]


def test_a_step_changes_the_cache_in_place_and_copies_no_weights(params):
    state = start(
        Llama(CONFIG), params, rows(prompts=[[1]]), size=512, steps=frozenset()
    )
    compiled = advance.lower(
        Llama(CONFIG), params, state, steps=frozenset(), count=4
    ).compile()
    cache = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache
    # What a step computes, and on a CPU the transposed head; one layer's cache is more.
    assert memory.temp_size_in_bytes < cache / 2


def test_a_merged_adapter_leaves_a_plain_model():
    adapted = adapted_params(CONFIG, ALL_LINEAR)
    tokens = jnp.arange(12).reshape(2, 6)
    expected = logits_of(adapted, tokens)
    exact = merge(adapted)
    merged = decoding_weights(map_leaves(lambda _, leaf: jnp.array(leaf), adapted))
    assert not [
        leaf for m in modules(merged).values() for leaf in m if is_adapter(leaf)
    ]
    assert jax.tree.structure(merged) == jax.tree.structure(exact)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), merged, exact
    )
    found = logits_of(merged, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
def test_other_adapters_are_merged_as_exports_are(changes):
    adapted = adapted_params(CONFIG, replace(ALL_LINEAR, **changes))
    merged = decoding_weights(adapted)
    jax.tree.map(np.testing.assert_array_equal, merged, merge(adapted))


def test_lengths_are_few_and_never_pass_a_change_of_the_angles():
    lengths = {rounded_up(n) for n in range(1, 8193)}
    assert all(rounded_up(n) - n < max(64, n / 3.9) for n in range(1, 8193))
    assert len(lengths) < 30
    rope = replace(
        CONFIG.rope_parameters,
        rope_type="longrope",
        original_max_position_embeddings=100,
    )
    config = replace(CONFIG, rope_parameters=rope, max_position_embeddings=500)
    assert cache_size(config, 90, 2048) == 100
    assert cache_size(config, 101, 2048) == 500
    assert cache_size(config, 101) == 128
    assert steps_of(rows(SamplingConfig(temperature=1.0))) == {"temperature"}
