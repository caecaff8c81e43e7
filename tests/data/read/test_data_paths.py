import gzip
import json
import sys

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from helpers.data_cases import load, make_tokenizer, write_rows

from jlora.data.read.data_paths import find_data_sources
from jlora.errors import CorruptError, UnsupportedError, UsageError

ROWS = [{"text": f"the sum {i}", "id": i, "date": None} for i in range(5)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": "add", "tool_calls": None},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f"}}],
            },
            {"role": "tool", "content": "5", "tool_calls": None},
            {"role": "assistant", "content": "five", "tool_calls": None},
        ]
    }
]


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(path, rows, kind):
    """Writes rows as one of the kinds of file that jlora reads."""
    table = pyarrow.Table.from_pylist(rows)
    path = path / f"data.{kind}"
    if kind == "jsonl":
        path.write_bytes(lines(rows))
    elif kind == "jsonl.gz":
        middle = len(rows) // 2  # two members, as `cat a.gz b.gz` makes
        path.write_bytes(
            gzip.compress(lines(rows[:middle])) + gzip.compress(lines(rows[middle:]))
        )
    elif kind == "jsonl.zst":
        path.write_bytes(pyarrow.compress(lines(rows), "zstd", asbytes=True))
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif kind == "arrow":
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, 2)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, 2)
    return path


KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "stream.arrow"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["text", "messages"])
def test_every_kind_of_file_gives_the_same_tokens(tmp_path, rows, kind):
    tokenizer = make_tokenizer("tools")
    expected = load(write(tmp_path, rows, "jsonl"), tokenizer)
    data = load(write(tmp_path, rows, kind), tokenizer)
    assert data.fingerprint == expected.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_file_is_detected_from_its_content_not_its_name(tmp_path, kind):
    path = write(tmp_path, ROWS, kind).rename(tmp_path / "data.txt")
    assert load(path).num_records == 5


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet", "arrow"])
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_cut_file_is_damaged(tmp_path, kind, share):
    rows = [{"text": f"{i} {hash(str(i))}"} for i in range(500)]
    path = write(tmp_path, rows, kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CorruptError, match="damaged"):
        load(path)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream.arrow"])
def test_bad_row_of_columns_names_the_row(tmp_path, kind):
    path = write(tmp_path, [*ROWS, {"text": None}], kind)
    with pytest.raises(CorruptError, match="row 6: text is null"):
        load(path)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream.arrow"])
def test_columns_that_fit_no_format_are_listed(tmp_path, kind):
    path = write(tmp_path, [{"question": "a", "answer": "b"}], kind)
    with pytest.raises(CorruptError, match="the keys answer, question fit no format"):
        load(path)


@pytest.mark.parametrize("kind", ["jsonl.zst", "parquet", "arrow", "stream.arrow"])
def test_missing_library_names_the_extra(tmp_path, monkeypatch, kind):
    path = write(tmp_path, ROWS, kind)
    monkeypatch.setenv("JLORA_CACHE", str(tmp_path / "cache"))  # with nothing in it
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'jlora\[parquet\]'"):
        load(path)


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"PK\x03\x04", "a zip archive"),
        (b"BZh9", "compressed with bzip2"),
        (b"\xfd7zXZ\0", "compressed with xz"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
)
def test_foreign_file_is_unsupported(tmp_path, head, what):
    with pytest.raises(UnsupportedError, match=what):
        load(write_rows(tmp_path / "data.jsonl", [head]))


def test_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jlora.data.read.text_rows.RATIO_FROM_BYTES", 1 << 16)
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" * 10_000_000))
    with pytest.raises(CorruptError, match="unpacks to more than"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"\n \r\n"])
def test_empty_file_is_a_usage_error(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="no records"):
        load(path)


def test_device_is_a_usage_error():
    with pytest.raises(UsageError, match="/dev/null: no records"):
        find_data_sources("/dev/null")


def test_missing_file_names_the_nearest(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(
        UsageError, match=r"no such file or folder; did you mean '.*train\.jsonl'"
    ):
        load(tmp_path / "trian.jsonl")


def test_file_in_a_missing_folder_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path / "nowhere" / "train.jsonl")


def names(given) -> list[list[str]]:
    return [[file.name for file in source.files] for source in find_data_sources(given)]


@pytest.fixture
def folder(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "c.parquet", "README.md", ".hidden.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "d.jsonl").touch()
    return tmp_path


def test_folder_is_its_data_files_by_name(folder):
    (source,) = find_data_sources(str(folder))
    assert [f.name for f in source.files] == ["a.jsonl.gz", "b.jsonl", "c.parquet"]
    assert source.ignored == ("README.md",)


def test_other_files_of_a_folder_are_reported(folder):
    for name in ("a.jsonl.gz", "c.parquet"):
        (folder / name).unlink()
    write_rows(folder / "b.jsonl", ROWS)
    assert any("ignored: README.md" in line for line in load(folder).summary)


def test_folder_without_data_is_a_usage_error(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UsageError, match=r"no data files.*folders train"):
        find_data_sources(str(tmp_path))


def test_glob_is_its_matches_by_name(folder):
    assert names(str(folder / "*.jsonl*")) == [["a.jsonl.gz", "b.jsonl"]]
    assert names(str(folder / "**" / "*.jsonl")) == [["b.jsonl", "d.jsonl"]]


def test_glob_without_match_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no file matches"):
        find_data_sources(str(tmp_path / "*.jsonl"))


def test_name_with_magic_letters_is_a_file_if_there_is_one(tmp_path):
    (tmp_path / "a[1].jsonl").touch()
    assert names(str(tmp_path / "a[1].jsonl")) == [["a[1].jsonl"]]


def test_several_sources_keep_their_order(folder):
    given = [str(folder / "c.parquet"), str(folder / "more")]
    assert names(given) == [["c.parquet"], ["d.jsonl"]]


def test_source_given_twice_is_a_usage_error(folder):
    with pytest.raises(UsageError, match=r"given twice.*weights"):
        find_data_sources([str(folder), str(folder)])


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_weight_out_of_range_is_a_usage_error(folder, weight):
    with pytest.raises(UsageError, match="weight"):
        find_data_sources({str(folder): weight})


def save_to_disk(path, files: dict[str, list[dict]]):
    """A folder as datasets' `Dataset.save_to_disk` writes it."""
    path.mkdir(parents=True)
    for name, rows in files.items():
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(path / name, table.schema) as writer:
            writer.write_table(table)
    (path / "dataset_info.json").write_text("{}")
    state = {"_data_files": [{"filename": name} for name in files], "_split": "train"}
    (path / "state.json").write_text(json.dumps(state))
    return path


def test_saved_data_set_is_read_in_its_order(tmp_path):
    files = {"data-00001.arrow": ROWS[:2], "data-00000.arrow": ROWS[2:]}
    saved = save_to_disk(tmp_path / "saved", files)
    assert names(str(saved)) == [["data-00001.arrow", "data-00000.arrow"]]
    expected = load(write(tmp_path, ROWS, "jsonl"))
    assert load(saved).fingerprint == expected.fingerprint


def test_split_train_of_saved_splits_is_read(tmp_path):
    save_to_disk(tmp_path / "all" / "train", {"data-00000.arrow": ROWS})
    save_to_disk(tmp_path / "all" / "test", {"data-00000.arrow": ROWS[:1]})
    document = {"splits": ["train", "test"]}
    (tmp_path / "all" / "dataset_dict.json").write_text(json.dumps(document))
    assert load(tmp_path / "all").num_records == 5


def test_saved_splits_without_train_are_a_usage_error(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["a", "b"]}')
    with pytest.raises(UsageError, match="none is named train"):
        find_data_sources(str(tmp_path))


@pytest.mark.parametrize("name", ["data-00000.arrow", "../data.arrow"])
def test_saved_data_set_without_its_files_is_corrupt(tmp_path, name):
    (tmp_path / "data.arrow").touch()
    (tmp_path / "saved").mkdir()
    state = {"_data_files": [{"filename": name}]}
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(CorruptError, match="not in the folder"):
        find_data_sources(str(tmp_path / "saved"))


def test_selection_of_an_old_version_is_unsupported(tmp_path):
    state = {"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UnsupportedError, match="selection of rows"):
        find_data_sources(str(tmp_path))
