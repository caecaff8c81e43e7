import re

import pytest

from jlora.config.lora_config import LoraConfig
from jlora.errors import UsageError
from jlora.lora.name_matching import matching_whole
from jlora.lora.target_modules import select_targets

LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
IN_LAYERS = [
    f"model.layers.{i}.{block}.{linear}"
    for i in range(3)
    for block, linears in LINEARS.items()
    for linear in linears
]
NAMES = ["model.embed_tokens", *IN_LAYERS, "lm_head"]


def q(*layers):
    return [f"model.layers.{i}.self_attn.q_proj" for i in layers]


def v(*layers):
    return [f"model.layers.{i}.self_attn.v_proj" for i in layers]


def select(*, strict=True, **fields):
    return select_targets(LoraConfig(**fields), NAMES, strict=strict)


def refused(**fields):
    with pytest.raises(UsageError) as caught:
        select(**fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, q(0, 1, 2) + v(0, 1, 2)),
        ({"target_modules": ["q_proj"]}, q(0, 1, 2)),
        ({"target_modules": ["self_attn.q_proj"]}, q(0, 1, 2)),
        ({"target_modules": q(1)}, q(1)),
        ({"target_modules": r".*\.[02]\..*q_proj"}, q(0, 2)),
        ({"target_modules": "all-linear"}, IN_LAYERS),
        ({"target_modules": "ALL-Linear"}, IN_LAYERS),
        ({"target_modules": ["q_proj"], "exclude_modules": q(0)}, q(1, 2)),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}, q(1, 2)),
        (
            {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
            [name for name in IN_LAYERS if name not in q(0, 1, 2)],
        ),
        # An entry that names a container does not cover what is inside it.
        ({"target_modules": ["q_proj"], "exclude_modules": ["self_attn"]}, q(0, 1, 2)),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, q(1)),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, q(0, 2)),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, q(0, 1, 2)),
        # An exact name is not filtered by layer.
        (
            {"target_modules": ["q_proj", *v(2)], "layers_to_transform": [0]},
            q(0) + v(2),
        ),
        (
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": 1,
                "layers_pattern": "layers",
            },
            q(1),
        ),
        (
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": 1,
                "layers_pattern": ["h", "layers"],
            },
            q(1),
        ),
    ],
)
def test_selection_follows_peft(fields, expected):
    assert sorted(select(**fields)) == sorted(expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "q_proj"},  # a string is a regular expression, matched whole
        {"target_modules": ["proj"]},  # no part of a name
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 9},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": 1,
            "layers_pattern": "blocks",
        },
    ],
)
def test_selecting_nothing_is_an_error(fields):
    assert "selects no module" in refused(**fields)


@pytest.mark.parametrize("targets", ["q_porj", ["q_porj"], ["v_proj", "q_porj"]])
def test_a_mistyped_module_names_the_nearest(targets):
    assert "did you mean 'q_proj'?" in refused(target_modules=targets)


def test_a_bare_name_as_a_string_is_told_to_be_a_list():
    message = refused(target_modules="q_proj")
    assert "regular expression" in message
    assert "[q_proj]" in message


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_embedding_and_head_are_modules_like_others(target):
    name = next(name for name in NAMES if name.endswith(target))
    assert sorted(select(target_modules=["q_proj", target])) == [
        *sorted([name, *q(0, 1, 2)])
    ]


@pytest.mark.parametrize("target", [r".*\.self_attn", ["mlp"], ".*"])
def test_a_container_is_named_as_not_linear(target):
    message = refused(target_modules=target)
    assert "is not a linear layer" in message
    assert "q_proj" in message


def test_every_entry_that_matches_nothing_is_listed_with_the_nearest_name():
    message = refused(
        target_modules=["q_proj", "v_prj"],
        exclude_modules=["up_porj"],
        rank_pattern={"q_pro": 4},
        alpha_pattern={"k_proj": 4},
    )
    for part in (
        "lora.target_modules: 'v_prj' matches no module; did you mean 'v_proj'?",
        "lora.exclude_modules: 'up_porj' matches no module; did you mean 'up_proj'?",
        "lora.rank_pattern: 'q_pro' matches no module; did you mean 'q_proj'?",
        "lora.alpha_pattern: 'k_proj' matches no module",
    ):
        assert part in message


def test_a_saved_adapter_with_an_idle_entry_loads_with_a_warning(capsys):
    selected = select(strict=False, target_modules=["q_proj", "v_prj"])
    assert sorted(selected) == q(0, 1, 2)
    assert "'v_prj' matches no module" in capsys.readouterr().err


def test_entries_that_match_are_silent(capsys):
    select(target_modules=["q_proj"], rank_pattern={"q_proj": 2}, strict=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("q_proj", [0, 1, 2]),
        ("1.self_attn.q_proj", [1]),
        (r"layers\.[01]\.self_attn\.q_proj", [0, 1]),
        (r"model\.layers\.2\..*", [2]),
    ],
)
def test_patterns_match_the_end_of_a_name(pattern, layers):
    selected = select(
        target_modules=["q_proj"],
        r=4,
        lora_alpha=8,
        rank_pattern={pattern: 2},
        alpha_pattern={pattern: 6},
    )
    expected = dict.fromkeys(q(0, 1, 2), (4, 2.0))
    assert selected == expected | dict.fromkeys(q(*layers), (2, 3.0))


def test_a_pattern_matches_no_part_of_a_word():
    assert "matches no module" in refused(rank_pattern={"proj": 2})


def test_patterns_that_contradict_each_other_are_refused_in_training():
    message = refused(rank_pattern={"q_proj": 2, r"layers\.0\..*": 4})
    assert "give model.layers.0.self_attn.q_proj different values" in message


def test_the_first_of_two_patterns_counts_in_a_saved_adapter():
    patterns = {r"layers\.0\..*": 4, "q_proj": 2}
    selected = select(strict=False, target_modules=["q_proj"], rank_pattern=patterns)
    assert [rank for rank, _ in selected.values()] == [4, 2, 2]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "q_proj("},
        {"exclude_modules": "q_proj("},
        {"rank_pattern": {"q_proj(": 2}},
    ],
)
def test_a_bad_regular_expression_is_an_error(fields):
    assert "is not a regular expression" in refused(**fields)


def test_a_misspelt_name_gets_the_nearest_name():
    assert "did you mean 'q_proj'?" in refused(target_modules=["q_porj"])


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "((.*)*)*x"},
        {"target_modules": "(.+)+x"},
        {"target_modules": "(.|.)*x"},
        {"target_modules": "(a?){5000}" * 200},
        {"target_modules": ["q_proj"], "exclude_modules": "((.+)+)+x"},
        {"target_modules": ["q_proj"], "rank_pattern": {"((.+)+)+x": 4}},
        {"target_modules": ["q_proj"], "alpha_pattern": {"((.+)+)+x": 4}},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "((.+)+)+x"]},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [0],
            "layers_pattern": "((.+)+)+x",
        },
    ],
)
def test_endless_regular_expression_is_refused(fields, monkeypatch):
    monkeypatch.setattr("jlora.limited_regex.CPU_SECONDS", 0.2)
    message = refused(**fields)
    assert "regular expression" in message
    assert "cannot be used: it took more than" in message or "is not a" in message


def test_regular_expressions_are_those_of_python():
    # None of these means the same in every other engine.
    names = ["a{e}", "aa", "ab", "a\n", "É"]
    for pattern in (r"(?:a){e}", r"(a)\1", r"a(?=b).", r"(?i)é", r"a\Z|a+"):
        expected = [name for name in names if re.fullmatch(pattern, name)]
        assert matching_whole(pattern, names) == expected
