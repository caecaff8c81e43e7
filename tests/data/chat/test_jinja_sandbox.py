import json
import math

import pytest
from helpers.data_cases import make_tokenizer, render
from helpers.hostile_templates import ADDRESSES, BROKEN, ENDLESS

from jlora.data.chat import chat_template
from jlora.data.chat.chat_template import ChatTemplate
from jlora.errors import CorruptError
from jlora.limited_process import LimitedProcess

USER = [{"role": "user", "content": "hello"}]


def rendered(source: str, messages=USER) -> str:
    template = ChatTemplate(source, special_tokens={}, added_tokens={})
    return template.render(template.prepare(messages)).text


@pytest.fixture(scope="module")
def small_process():
    """Limits that hold as the real ones do, and are reached sooner."""
    process = LimitedProcess("jlora.data.chat.jinja_sandbox", memory_bytes=1 << 28)
    yield process
    process.close()


@pytest.fixture
def small_limits(small_process, monkeypatch):
    monkeypatch.setattr(chat_template, "_PROCESS", small_process)
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 0.15)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("source", ENDLESS, ids=range(len(ENDLESS)))
def test_endless_template_is_stopped_and_the_next_one_renders(source):
    with pytest.raises(
        CorruptError, match=r"^chat template: (it took more than|stopped)"
    ):
        rendered(source)
    assert rendered("{{ messages[0].content }}") == "hello"


@pytest.mark.parametrize("source", BROKEN, ids=range(len(BROKEN)))
def test_broken_template_is_refused(source):
    with pytest.raises(CorruptError, match="chat template"):
        rendered(source)


@pytest.mark.parametrize("source", ADDRESSES)
def test_no_address_gets_into_a_text(source):
    with pytest.raises(CorruptError, match="SecurityError"):
        rendered(source)


def test_order_of_a_set_does_not_differ_between_processes():
    source = "{{ ({'a': 1, 'b': 2, 'c': 3, 'd': 4}.keys() - {'a': 1}.keys()) | join }}"
    texts = set()
    for _ in range(5):
        chat_template._PROCESS.close()
        texts.add(rendered(source))
    assert len(texts) == 1


def test_iterators_of_filters_are_consumed_as_in_jinja2():
    source = (
        "{% set g = messages | map(attribute='content') %}{{ g | list }}{{ g | list }}"
        "{{ g is iterable }}{{ g is sequence }}{{ messages | map('length') | sum }}"
    )
    assert rendered(source) == "['hello'][]TrueFalse2"


def test_methods_are_callable_and_comparable_as_in_jinja2():
    source = (
        "{% set f = messages[0].items %}{{ f is callable }}{{ f() | list | length }}"
        "{{ 'a{}'.format(1) }}{{ messages[0].keys is defined }}{{ messages[0].x is defined }}"
    )
    assert rendered(source) == "True2a1TrueFalse"


@pytest.mark.parametrize(
    "value",
    [
        1,
        1.0,
        True,
        None,
        "1",
        -0.0,
        1e300,
        10**40,
        "é\u2028\0",
        [1, [2.5]],
        {"a": None},
    ],
)
def test_values_keep_their_types_on_the_way_to_the_template(value):
    messages = [{"role": "user", "content": [value]}]
    assert rendered("{{ messages[0].content }}", messages) == repr([value])


def test_numbers_that_are_none_reach_the_template():
    messages = [{"role": "user", "content": [math.nan, math.inf]}]
    assert rendered("{{ messages[0].content }}", messages) == "[nan, inf]"


def test_a_number_that_python_cannot_print_is_refused():
    with pytest.raises(CorruptError, match="integer"):
        rendered("{{ messages[0].content }}", [{"role": "user", "content": 10**5000}])


def test_long_conversation_renders_all_its_prefixes():
    messages = [{"role": "user", "content": "x" * 10**6}] * 20
    assert len(rendered("{{ messages | tojson }}", messages)) == len(
        json.dumps(messages)
    )


def test_template_of_a_tokenizer_is_named_by_its_file():
    tokenizer = make_tokenizer(chat_template="{{ 'a' * 10**10 }}")
    with pytest.raises(
        CorruptError, match=r"^chat template of tokenizer_config\.json: it"
    ):
        render(tokenizer, USER)
