from pathlib import Path

import numpy as np
import pytest

from jlora.config.lora_config import LoraConfig
from jlora.errors import CorruptError, UnsupportedError, UsageError
from jlora.formats.peft.adapter import Adapter
from jlora.formats.peft.combine_adapters import combine_adapters

SIZES = {"q_proj": (12, 8), "v_proj": (12, 4)}


def adapter(
    rank=2, alpha=3.0, names=("q_proj", "v_proj"), seed=0, sizes=SIZES, **settings
):
    rng = np.random.default_rng(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(names),
        base_model_name_or_path="base",
        **settings,
    )
    tensors = {}
    for name in names:
        own = config.rank_pattern.get(name, rank)
        tensors[f"layers/0/self_attn/{name}"] = {
            "lora_A": rng.normal(size=(sizes[name][0], own)).astype(np.float32),
            "lora_B": rng.normal(size=(own, sizes[name][1])).astype(np.float32),
        }
    return Adapter.make(config, tensors, Path(f"adapter{seed}"))


def deltas(made):
    return {
        path: made.scalings[path] * pair["lora_A"].astype(float) @ pair["lora_B"]
        for path, pair in made.tensors.items()
    }


def weighted(adapters, weights):
    total = {}
    for made, weight in zip(adapters, weights, strict=True):
        for path, delta in deltas(made).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


UNEVEN = [
    adapter(2, 3.0),
    adapter(5, 7.0, seed=1, use_rslora=True, rank_pattern={"v_proj": 3}),
    adapter(1, 4.0, ("v_proj",), seed=2),
]


WEIGHTS = [0.7, -1.3, 2.0]


@pytest.mark.parametrize(("how", "rank"), [("cat", 8), ("svd", 8)])
def test_the_result_is_the_weighted_sum_of_the_updates(how, rank):
    made = combine_adapters(
        UNEVEN, WEIGHTS, how, svd_rank=rank if how == "svd" else None
    )
    assert made.config.r == rank
    found, expected = deltas(made), weighted(UNEVEN, WEIGHTS)
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], atol=1e-5)


def test_svd_keeps_the_largest_singular_values():
    found = deltas(combine_adapters(UNEVEN, WEIGHTS, "svd", svd_rank=2))
    for path, whole in weighted(UNEVEN, WEIGHTS).items():
        u, s, v = np.linalg.svd(whole)
        np.testing.assert_allclose(found[path], (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)


def test_linear_takes_roots_of_weight_times_scaling_and_the_sign_on_a():
    pair = adapter(2, 3.0), adapter(2, 8.0, seed=1)
    made = combine_adapters(pair, [2.0, -0.5], "linear")
    roots = np.sqrt([2.0 * 1.5, 0.5 * 4])
    for path, found in made.tensors.items():
        a, b = ([x.tensors[path][leaf] for x in pair] for leaf in ("lora_A", "lora_B"))
        np.testing.assert_allclose(
            found["lora_A"], roots[0] * a[0] - roots[1] * a[1], atol=1e-6
        )
        np.testing.assert_allclose(
            found["lora_B"], roots[0] * b[0] + roots[1] * b[1], atol=1e-6
        )


@pytest.mark.parametrize(
    ("adapters", "weights", "how", "more", "words"),
    [
        (UNEVEN, [1.0], "cat", {}, "3 adapters and 1 weights"),
        ([], [], "cat", {}, "0 adapters"),
        (UNEVEN, [1.0, np.nan, 1.0], "cat", {}, "expected finite numbers"),
        (UNEVEN[:2], [1.0, 1.0], "linear", {}, "ranks differ: 2, 5; use cat or svd"),
        (UNEVEN, WEIGHTS, "svd", {"svd_rank": 0}, "svd_rank=0"),
        (UNEVEN, WEIGHTS, "cat", {"svd_rank": 4}, "for svd only"),
    ],
)
def test_what_does_not_go_together_is_refused(adapters, weights, how, more, words):
    with pytest.raises(UsageError, match=words):
        combine_adapters(adapters, weights, how, **more)


def test_adapters_of_different_bases_are_refused():
    other = adapter(sizes={"q_proj": (12, 8), "v_proj": (10, 4)})
    with pytest.raises(CorruptError, match="belong to different bases"):
        combine_adapters([adapter(), other], [1.0, 1.0], "cat")


def test_an_adapter_with_more_than_pairs_is_refused():
    more = adapter()
    more.tensors["layers/0/self_attn/q_proj"]["lora_magnitude"] = np.ones(8, np.float32)
    with pytest.raises(UnsupportedError, match="lora_magnitude"):
        combine_adapters([adapter(), more], [1.0, 1.0], "cat")
