import pytest
from data_cases import chat, load, make_tokenizer, write_rows

from jlora.errors import CorruptError, UnsupportedError, UsageError

GOOD = {"text": "the sum"}
USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "yes"}


def refusal(path, rows, **config) -> str:
    with pytest.raises(CorruptError) as caught:
        load(write_rows(path / "data.jsonl", rows), **config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (GOOD, "text"),
        ({"prompt": "the", "completion": " sum"}, "prompt_completion"),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt_completion"),
        (chat("the", "sum"), "messages"),
        (chat("the", "sum") | {"text": "ignored", "id": 3}, "messages"),
    ],
)
def test_format_is_read_off_the_first_record(tmp_path, row, format):
    data = load(write_rows(tmp_path / "data.jsonl", [row]))
    assert f"format {format}," in data.summary[0]


def test_named_format_beats_detection(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [chat("a", "b") | GOOD])
    assert "format text," in load(path, format="text").summary[0]


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_line_ends_byte_order_mark_and_blank_lines_are_accepted(tmp_path, line_end):
    path = tmp_path / "data.jsonl"
    lines = [b'\xef\xbb\xbf{"text": "a"}', b"", b'{"text": "b"}', b"  "]
    path.write_bytes(line_end.join(lines))
    assert load(path).num_records == 2


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", ['{"text": "a\u2028b\u0085c"}'])
    assert load(path).num_records == 1


def test_nul_and_carriage_return_in_a_text_are_kept(tmp_path):
    tokenizer = make_tokenizer()
    path = write_rows(tmp_path / "data.jsonl", [{"text": "a\0b\r\n"}])
    ids = load(path, tokenizer).tokens.tolist()
    assert tokenizer.decode(ids) == "a\0b\r\n"


def test_broken_line_names_file_line_and_column(tmp_path):
    message = refusal(tmp_path, [GOOD, '{"text": "a" "b"}'])
    assert "data.jsonl" in message
    assert "line 2, column 14: not JSON" in message


def test_every_bad_line_is_listed_at_once(tmp_path):
    rows = [GOOD, "{", {"text": None}, {"texd": "a"}, GOOD, {"text": "\ud800"}]
    message = refusal(tmp_path, rows)
    assert "4 of 6 records" in message
    assert [f"line {i}" in message for i in range(1, 7)] == [0, 1, 1, 1, 0, 1]


def test_long_list_of_bad_lines_is_capped(tmp_path):
    message = refusal(tmp_path, [GOOD, *[{"text": 1}] * 20])
    assert message.count("line ") == 12
    assert "and 8 more" in message


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"txt": "a"}, "no text; did you mean 'txt'?"),
        ({"text": None}, "text is null"),
        ({"text": 3}, "text is a int"),
        ({"text": ["a"]}, "text is a list"),
        ({"text": ""}, "text is empty"),
        ('["a"]', "expected an object, found a list"),
        ('"a"', "expected an object, found a string"),
        ('{"text": "a", "text": "b"}', "the key 'text' occurs twice"),
        (b'{"text": "\xff"}', "column 11: not UTF-8"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_bad_text_record_names_line_and_reason(tmp_path, row, reason):
    message = refusal(tmp_path, [GOOD, row])
    assert "line 2" in message
    assert reason in message


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, "messages is null"),
        ("hello", "messages is a string"),
        ([], "messages is an empty list"),
        (["hello"], "messages[0] is a string"),
        ([{"role": "user"}], "messages[0] has no content"),
        ([{"content": "a"}], "messages[0] has no role"),
        ([USER, {"role": "assistant", "content": None}], "messages[1].content is null"),
        ([{"role": "user", "content": [{"text": "a"}]}], "content is a list"),
        ([USER, {"role": "assistant", "content": ""}], "messages[1].content is empty"),
        ([{"role": "", "content": "a"}], "messages[0].role is empty"),
        ([USER, {"role": "assitant", "content": "a"}], "did you mean 'assistant'?"),
        ([{"role": "user", "content": "\ud800"}, ANSWER], "lone surrogate"),
    ],
)
def test_bad_conversation_names_line_and_reason(tmp_path, messages, reason):
    message = refusal(tmp_path, [chat("a", "b"), {"messages": messages}])
    assert "line 2" in message
    assert reason in message


def test_tools_that_are_no_list_are_refused(tmp_path):
    rows = [chat("a", "b") | {"tools": "[]"}]
    assert "tools is a string" in refusal(tmp_path, rows)


def test_first_record_decides_between_strings_and_messages(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": [USER], "completion": [ANSWER]},
    ]
    assert "line 2: prompt is a list; expected a string" in refusal(tmp_path, rows)


def test_unknown_columns_list_what_is_expected(tmp_path):
    message = refusal(tmp_path, [{"question": "a", "answer": "b"}])
    assert "answer, question" in message
    assert "messages or prompt + completion or text" in message


@pytest.mark.parametrize("column", ["conversations", "instruction"])
def test_foreign_format_is_unsupported(tmp_path, column):
    with pytest.raises(UnsupportedError, match=column):
        load(write_rows(tmp_path / "data.jsonl", [{column: "a"}]))


@pytest.mark.parametrize("head", [b"PAR1", b"\x1f\x8b\x08"])
def test_foreign_file_is_unsupported(tmp_path, head):
    with pytest.raises(UnsupportedError, match="plain JSONL"):
        load(write_rows(tmp_path / "data.jsonl", [head]))


def test_overlong_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jlora.data.jsonl.MAX_LINE_BYTES", 100)
    assert "line 2: longer than 100" in refusal(tmp_path, [GOOD, {"text": "a" * 100}])


@pytest.mark.parametrize("content", [b"", b"\n \r\n"])
def test_empty_file_is_a_usage_error(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="no records"):
        load(path)


def test_missing_file_names_the_nearest(tmp_path):
    write_rows(tmp_path / "train.jsonl", [GOOD])
    with pytest.raises(UsageError, match=r"did you mean 'train\.jsonl'"):
        load(tmp_path / "trian.jsonl")


def test_file_in_a_missing_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path / "nowhere" / "train.jsonl")


def test_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        load(tmp_path)
