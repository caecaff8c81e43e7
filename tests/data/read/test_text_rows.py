import gzip
import json

import pytest
from helpers.data_cases import load, write_rows

from jlora.data.read.data_paths import find_data_sources
from jlora.data.read.text_rows import text_rows
from jlora.errors import CorruptError

ROWS = [{"text": f'the "sum",\n{i} é \U0001f600', "n": i} for i in range(50)]
# The lengths move the ends of items over the borders of the blocks that are read.
LONG = [{"text": "x" * (i * 997 % 70000)} for i in range(1, 40)]


def rows_of(path) -> list[dict[str, object]]:
    return [r if isinstance(r, dict) else json.loads(r) for _, r in text_rows(path)]


@pytest.mark.parametrize("rows", [ROWS, LONG], ids=["short", "long"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gzip"])
def test_json_array_gives_its_items(tmp_path, rows, indent, encoding):
    text = f"\n {json.dumps(rows, indent=indent, ensure_ascii=False)}\n"
    path = tmp_path / "data.json"
    if encoding == "gzip":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_bytes(text.encode(encoding))
    assert rows_of(path) == rows
    assert [number for number, _ in text_rows(path)] == [*range(1, len(rows) + 1)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_lines_may_be_utf_16_with_a_mark(tmp_path, encoding):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    path = tmp_path / "data.jsonl"
    path.write_bytes((mark + lines).encode(encoding))
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_table_gives_a_text_for_each_column(tmp_path, name, encoding):
    sign = "\t" if "tsv" in name else ","
    text = f'instruction{sign}output\r\n"say ""hi"",\tor\nso"{sign}é\r\n\r\na{sign}\r\n'
    raw = text.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert list(text_rows(tmp_path / name)) == [
        (3, {"instruction": 'say "hi",\tor\nso', "output": "é"}),
        (5, {"instruction": "a", "output": ""}),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[", "record 1 of the array: not JSON, Expecting value"),
        ('[{"a": 1}', "record 2 of the array: expected a comma or the array's end"),
        ('[{"a": 1},]', "record 2 of the array: not JSON"),
        ('[{"a": 1} {"a": 2}]', "record 2 of the array: expected a comma"),
        ('[{"a": 1}, {"a": ', "record 2 of the array: not JSON"),
        ('[{"a": 1}] [', "text follows the JSON array"),
        (f"[{'[' * 100_000}", "record 1 of the array: JSON nested too deeply"),
    ],
)
def test_damaged_array_names_the_record(tmp_path, text, reason):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(CorruptError) as error:
        list(text_rows(path))
    assert reason in str(error.value)


def test_overlong_record_of_an_array_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jlora.data.read.text_rows.MAX_LINE_BYTES", 100_000)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"text": "x" * 300_000}]))
    with pytest.raises(
        CorruptError, match="record 1 of the array: longer than 100,000"
    ):
        list(text_rows(path))


def test_bad_record_of_an_array_is_a_bad_row_with_its_number(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"text": "a"},\n {"text": ""}, 3, {"text": "b", "text": "c"}]')
    with pytest.raises(CorruptError) as error:
        load(path)
    for said in (
        "record 2: text is empty",
        "record 3: expected an object, found a number",
        "record 4: the key 'text' occurs twice",
    ):
        assert f"data.json, {said}" in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a,a\n1,2\n", "does not name each column once: 'a', 'a'"),
        ("a,\n1,2\n", "does not name each column once"),
        ("a,b\n1,2\n1,2,3\n", "line 3: 3 fields, where the first line names 2"),
        ("a,b\n1,2\n1\n", "line 3: 1 fields"),
        ('a,b\n1,2\n"1,2\n', "line 3: unexpected end of data"),
    ],
)
def test_damaged_table_names_the_line(tmp_path, text, reason):
    path = tmp_path / "data.csv"
    path.write_text(text)
    with pytest.raises(CorruptError) as error:
        list(text_rows(path))
    assert reason in str(error.value)


def test_columns_of_a_table_may_hold_conversations(tmp_path):
    path = tmp_path / "data.csv"
    messages = [{"role": r, "content": "a"} for r in ("user", "assistant")]
    text = json.dumps(messages).replace('"', '""')
    path.write_text(f'id,messages\n1,"{text}"\n')
    assert load(path).num_supervised == 2


def test_tables_of_a_folder_are_read_if_there_is_nothing_else(tmp_path):
    (tmp_path / "stats.csv").write_text("text\na\n")
    (source,) = find_data_sources(str(tmp_path))
    assert [file.name for file in source.files] == ["stats.csv"]
    write_rows(tmp_path / "data.jsonl", ROWS)
    (source,) = find_data_sources(str(tmp_path))
    assert [file.name for file in source.files] == ["data.jsonl"]
    assert source.ignored == ("stats.csv",)
