import pytest
from helpers.data_cases import TEMPLATES, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from jlora.model.decoding.text_stream import TextStream

NAMES = {case["tokenizer"]: name for name, case in TEMPLATES.items()}
TOKENIZERS = [make_tokenizer(NAMES[kind]) for kind in ("bytes", "metaspace")]


def streamed(tokenizer, ids, stop=()):
    """The parts of the text, the last one after the end, until a stop string."""
    stream, parts = TextStream(tokenizer.decode, stop), []
    for token in ids:
        parts.append(stream.add(token))
        if stream.is_stopped:
            break
    return [*parts, stream.end()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(text=st.text(max_size=30))
def test_the_parts_together_are_the_text(tokenizer, text):
    text = text.replace("\ufffd", "")
    ids = tokenizer.encode(text, add_bos=False)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@given(
    text=st.text("ab#\n", max_size=30), stop=st.sampled_from(["#", "\n\n", "ab#", "a"])
)
def test_the_text_ends_before_the_first_stop_string(tokenizer, text, stop):
    ids = tokenizer.encode(text, add_bos=False)
    parts = streamed(tokenizer, ids, [stop, ""])
    assert "".join(parts) == tokenizer.decode(ids).partition(stop)[0]


def test_of_several_stop_strings_the_first_in_the_text_counts():
    [tokenizer, _] = TOKENIZERS
    ids = tokenizer.encode("one END two STOP", add_bos=False)
    assert "".join(streamed(tokenizer, ids, ["STOP", "END"])) == "one "


def test_half_a_character_is_held_back_and_no_other_text():
    [tokenizer, _] = TOKENIZERS
    ids = tokenizer.encode("x\U0001f999y", add_bos=False)
    parts = streamed(tokenizer, ids)
    assert "\ufffd" not in "".join(parts)
    assert parts[0] == "x"
    assert parts[-2] == "y"
