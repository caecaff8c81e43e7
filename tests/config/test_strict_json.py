import json

import pytest

from jlora.config.strict_json import parse_json
from jlora.errors import CorruptError


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\udc00\ud800"])
def test_half_of_a_character_is_refused(text):
    for document in (text, [text], {text: 1}):
        with pytest.raises(CorruptError, match=r"f\.json: a text holds half of a"):
            parse_json(json.dumps(document).encode(), "f.json")


def test_a_character_of_two_halves_is_read():
    assert parse_json(json.dumps("\U0001f600").encode(), "f.json") == "\U0001f600"
