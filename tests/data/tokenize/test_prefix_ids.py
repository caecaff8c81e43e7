import itertools

import pytest
from helpers.data_cases import CONFIG, TEMPLATES, chat, make_tokenizer

from jlora.data.chat.control_tokens import Rendered
from jlora.data.tokenize.prefix_ids import encode_prefixes
from jlora.errors import JloraError

TEXTS = [
    "What is",
    " the  sum? ",
    "five\n\nof two",
    "a",
    "é<s",
    "\t",
    "<|im_",
    "[INST]",
]
NAMES = [name for name, case in TEMPLATES.items() if case["template"]]


def rendered(tokenizer, messages) -> Rendered:
    template = tokenizer.template()
    return template.render(template.prepare(messages))


def conversations(tokenizer):
    for texts in itertools.islice(itertools.permutations(TEXTS, 4), 0, 1600, 97):
        messages = chat(*texts)["messages"]
        try:
            yield rendered(tokenizer, messages)
        except JloraError:  # the template has no system turn, say
            continue


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_every_prefix_equal_those_of_encoding_it(name):
    tokenizer = make_tokenizer(name)
    unmarked = [whole for whole in conversations(tokenizer) if not whole.boundaries]
    assert unmarked
    for whole in unmarked:
        [encoded] = tokenizer.encode_rendered([whole])
        texts = [Rendered(whole.text[:end]) for end in range(len(whole.text))]
        found = encode_prefixes(
            dict.fromkeys(texts, whole), {whole: encoded}, tokenizer
        )
        wanted = tokenizer.encode_rendered(texts)
        for text, alone in zip(texts, wanted, strict=True):
            rest = found[text]
            assert encoded.ids[: rest.shared] + rest.ids == alone.ids


@pytest.mark.parametrize("name", NAMES)
def test_is_control_agrees_with_control_ids(name):
    tokenizer = make_tokenizer(name)
    ids = range(2 * CONFIG.vocab_size)
    found = tokenizer.is_control.take(ids, mode="clip")
    assert found.tolist() == [index in tokenizer.control_ids for index in ids]


def test_only_what_follows_the_last_control_token_is_encoded(monkeypatch):
    tokenizer = make_tokenizer()
    messages = chat("a" * 50, "b" * 50, "c", "d")["messages"]
    whole = rendered(tokenizer, messages)
    [encoded] = tokenizer.encode_rendered([whole])
    asked: list[str] = []
    encode = tokenizer.encode_many
    monkeypatch.setattr(
        tokenizer, "encode_many", lambda texts: asked.extend(texts) or encode(texts)
    )
    end = whole.text.index("c<|im_end|>")
    text = Rendered(whole.text[:end])
    encode_prefixes({text: whole}, {whole: encoded}, tokenizer)
    assert asked == ["<|im_start|>user\n"]
