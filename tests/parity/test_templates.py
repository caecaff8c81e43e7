"""Conversations made at random, rendered, encoded and masked as Transformers would."""

import json
from functools import cache

import numpy as np
import pytest
from helpers.data_cases import GOLDEN, TEMPLATES, make_tokenizer, render
from transformers import PreTrainedTokenizerFast

from jlora.data.chat.control_tokens import Rendered
from jlora.data.read.records import ChatRecord
from jlora.data.tokenize.assistant_masks import (
    MaskPlan,
    find_supervised_spans,
    plan_masks,
)

WORDS = [
    *("the", "sum", "of", "five", "café", "\U0001f600", "naïve", "x<y", '"q"', "&amp;"),
    *(
        "a\nb",
        "\n\n",
        "  ",
        "\t",
        "def f(x):\n    return x",
        "日本語",
        "[INST]",
        "{{ x }}",
    ),
]
CONVERSATIONS = 40


@cache
def theirs(name: str) -> PreTrainedTokenizerFast:
    case = TEMPLATES[name]
    return PreTrainedTokenizerFast(
        tokenizer_file=str(GOLDEN / f"{case['tokenizer']}.json"),
        bos_token=case["bos_token"],
        eos_token=case["eos_token"],
        chat_template=case["template"],
    )


def conversation(name: str, seed: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)

    def say(role: str) -> dict[str, str]:
        words = rng.choice(WORDS, rng.integers(1, 8))
        # An answer begins and ends with letters, or its border would share a token.
        return {"role": role, "content": f"a{' '.join(words)}z"}

    messages = [
        say(role) for _ in range(rng.integers(1, 4)) for role in ("user", "assistant")
    ]
    has_system = name != "mistral" and rng.random() < 0.5
    return [say("system"), *messages] if has_system else messages


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_text_and_ids_equal_transformers(name, prompt):
    ours = make_tokenizer(name)
    dated = {"date_string": "26 Jul 2024"}
    for seed in range(CONVERSATIONS):
        messages = conversation(name, seed)[: -1 if prompt else None]
        options = {"add_generation_prompt": prompt}
        text = theirs(name).apply_chat_template(
            messages, tokenize=False, **options, **dated
        )
        assert render(ours, messages, **options) == text
        ids = theirs(name).apply_chat_template(
            messages, return_dict=True, **options, **dated
        )
        assert ours.encode_chat(messages, **options) == ids["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_mask_is_what_transformers_renders_between_two_prefixes(name):
    ours = make_tokenizer(name)

    def ids(messages, prompt=False):
        out = theirs(name).apply_chat_template(
            messages,
            add_generation_prompt=prompt,
            return_dict=True,
            date_string="26 Jul 2024",
        )
        return out["input_ids"]

    for seed in range(CONVERSATIONS):
        messages = conversation(name, seed)
        expected = np.zeros(len(ids(messages)), int)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = len(ids(messages[:i], True)), len(ids(messages[: i + 1]))
                expected[start:end] = 1
        # A line break after the end of a turn is not the answer's.
        whole = ids(messages)
        tokens = theirs(name).convert_ids_to_tokens(whole)
        for i in range(1, len(tokens)):
            if tokens[i] in ("Ċ", "\n") and whole[i - 1] in ours.control_ids:
                expected[i] = 0
        record = ChatRecord(1, messages, None, 0)
        (plan,) = plan_masks([record], ours, train_on="assistant", where=str)
        assert isinstance(plan, MaskPlan)

        def encoded(rendered: Rendered):
            return ours.encode_rendered([rendered], with_offsets=True)[0]

        found, spans, all_end = find_supervised_spans(plan, ours, encoded)
        mask = np.zeros(len(found.ids), int)
        for start, end in spans:
            mask[start:end] = 1
        assert mask.tolist() == expected.tolist(), json.dumps(messages)
        assert all_end


def test_mask_of_generation_blocks_equals_transformers():
    ours = make_tokenizer("generation")
    for seed in range(CONVERSATIONS):
        messages = conversation("generation", seed)
        out = theirs("generation").apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        record = ChatRecord(1, messages, None, 0)
        (plan,) = plan_masks([record], ours, train_on="assistant", where=str)
        assert isinstance(plan, MaskPlan)
        whole = ours.encode_rendered([plan.whole], with_offsets=True)[0]
        _, spans, _ = find_supervised_spans(plan, ours, {plan.whole: whole}.__getitem__)
        mask = np.zeros(len(whole.ids), int)
        for start, end in spans:
            mask[start:end] = 1
        assert mask.tolist() == out["assistant_masks"]
