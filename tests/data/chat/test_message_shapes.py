import pytest
from helpers.data_cases import make_tokenizer, render

from jlora.data.read.bad_rows import RowError

START = "{% for m in messages %}{{ '<' + m.role + '>' }}"
CALLS = "{% for t in m.tool_calls or [] %}{% set a = t.function.arguments %}"
END = "{% endfor %}{% endfor %}"
ESCAPES = f"{START}{{{{ m.content }}}}{CALLS}{{{{ a | tojson }}}}{END}"
EITHER = (
    f"{START}{{{{ m.content }}}}{CALLS}{{{{ a if a is string else a | tojson }}}}{END}"
)
ONLY_TEXT = f"{START}{{{{ m.content }}}}{CALLS}{{{{ 'x' + a }}}}{END}"
PARTS = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}"
    "{% if not loop.last %}|{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def calling(template: str, arguments: object) -> str:
    call = {"function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    return render(make_tokenizer(chat_template=template), messages)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ESCAPES, '<user>a<assistant>{"x": 1}'),
        (EITHER, '<user>a<assistant>{"x":1}'),
        (ONLY_TEXT, '<user>a<assistant>x{"x":1}'),
    ],
)
def test_arguments_that_are_json_text_are_never_escaped(template, expected):
    assert calling(template, '{"x":1}') == expected


def test_arguments_that_are_an_object_stay_one():
    assert calling(ESCAPES, {"x": 1}) == '<user>a<assistant>{"x": 1}'


@pytest.mark.parametrize("text", ["here", "[1]", '{"x":', '"a"'])
def test_arguments_that_are_no_json_object_are_refused_where_escaped(text):
    with pytest.raises(RowError, match="would escape them"):
        calling(ESCAPES, text)
    assert calling(EITHER, text).endswith(text)


@pytest.mark.parametrize(
    ("template", "expected"),
    [(PARTS, "<user>a |b"), (ESCAPES, "<user>a b"), (EITHER, "<user>a b")],
)
def test_text_parts_are_joined_as_the_template_expects(template, expected):
    parts = [{"type": "text", "text": text} for text in ("a ", "b")]
    tokenizer = make_tokenizer(chat_template=template)
    assert render(tokenizer, [{"role": "user", "content": parts}]) == expected
