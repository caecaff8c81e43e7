import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.data_cases import load, make_tokenizer, write_rows
from helpers.hub_server import Hub, answer_at

from jlora.config.run_config import DataConfig
from jlora.data.batch.load_dataset import load_split
from jlora.data.read import hub_data
from jlora.data.read.data_paths import find_data_sources
from jlora.data.read.data_source import DataSource
from jlora.data.read.splits import TO_EVALUATE
from jlora.errors import CorruptError, JloraError, UsageError
from jlora.hub import list_data_set


def rows(count: int) -> bytes:
    return b"".join(b'{"text": "line %d"}\n' % i for i in range(count))


def put(hub: Hub, *names: str, configs=None, repository: str = "owner/name", **options):
    """A data set with files of 3, 4, 5, ... records."""
    files = {name: rows(count) for count, name in enumerate(names, start=3)}
    repo = hub.add(f"datasets/{repository}", Path("nothing"), **options)
    repo.files, repo.configs = {"README.md": b"about", **files}, configs
    return repo


def split(train: str, **config):
    config = DataConfig(train=train, **config)
    return load_split(make_tokenizer(), config, vocab_size=500, batch_size=2, seed=0)


def test_train_split_is_trained_on_and_validation_evaluated(hub):
    repository = put(hub, "train.jsonl", "validation.jsonl", "test.jsonl")
    data, held_out = split("owner/name")
    assert held_out
    assert (data.num_records, held_out.num_records) == (3, 4)
    assert hub.downloads == ["train.jsonl", "validation.jsonl"]
    revision = f"owner/name@{repository.commit}"
    assert data.revisions == held_out.revisions == [revision]
    said = [line for line in data.summary if revision in line]
    assert said == [f"owner/name: {revision} of the hub, the split train, 1 file"]


def test_parquet_and_compressed_files_are_read(hub, tmp_path):
    parquet = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["one", "two"]}), parquet)
    repository = put(hub, "train-00000-of-00002.parquet", "test.jsonl.gz")
    repository.files["train-00000-of-00002.parquet"] = parquet.read_bytes()
    repository.files["train-00001-of-00002.parquet"] = parquet.read_bytes()
    repository.files["test.jsonl.gz"] = gzip.compress(rows(7))
    assert load(Path("owner/name")).num_records == 4
    assert load(Path("owner/name:default/test")).num_records == 7


def test_the_revision_is_a_part_of_the_fingerprint(hub):
    put(hub, "train.jsonl")
    before = load(Path("owner/name"))
    put(hub, "train.jsonl").files["README.md"] = b"changed"
    list_data_set.cache_clear()
    after = load(Path("owner/name"))
    assert before.revisions != after.revisions
    assert before.fingerprint != after.fingerprint
    again = load(Path(before.revisions[0]))
    assert again.fingerprint == before.fingerprint


PARQUET = [
    "data/train_sft-00000-of-00001.jsonl",
    "data/test_sft-00000-of-00001.jsonl",
    "en/train.jsonl",
    "en/dev.jsonl",
    "all.jsonl",
]
CONFIGS = [
    {
        "config_name": "chat",
        "data_files": [
            {"split": "train_sft", "path": "data/train_sft-*"},
            {"split": "test_sft", "path": ["data/test_sft-*"]},
        ],
    },
    {"config_name": "english", "data_dir": "en"},
    {"config_name": "one", "data_files": "all.jsonl", "default": True},
    {"config_name": "two", "data_files": {"train": ["**/train.jsonl", "all.jsonl"]}},
]


def in_repository(source: DataSource) -> list[str]:
    commit = source.hub.partition("@")[2]
    return [file.as_posix().partition(f"{commit}/")[2] for file in source.files]


@pytest.mark.parametrize(
    ("name", "files", "validation"),
    [
        ("owner/name", ["all.jsonl"], None),
        ("owner/name@main", ["all.jsonl"], None),
        ("owner/name:english", ["en/train.jsonl"], ["en/dev.jsonl"]),
        ("owner/name:english/validation", ["en/dev.jsonl"], None),
        ("owner/name@main:chat/train_sft", PARQUET[:1], None),
        ("owner/name:chat/test_sft", PARQUET[1:2], None),
        ("owner/name:two", ["en/train.jsonl", "all.jsonl"], None),
    ],
)
def test_configurations_are_those_of_the_readme(hub, name, files, validation):
    put(hub, *PARQUET, configs=CONFIGS)
    (source,) = find_data_sources({name: 2.0})
    assert (source.name, source.weight) == (name, 2.0)
    assert in_repository(source) == files
    assert all(file.read_bytes().startswith(b'{"text":') for file in source.files)
    other = source.validation()
    assert (in_repository(other) if other else None) == validation


def test_without_configurations_a_folder_is_one(hub):
    names = ("default/train/0.jsonl", "other/train/0.jsonl", "other/test/0.jsonl")
    put(hub, *names, branches=("main", "refs/convert/parquet"))
    for revision in ("", "@refs/convert/parquet"):
        (source,) = find_data_sources(f"owner/name{revision}:other/test")
        assert in_repository(source) == ["other/test/0.jsonl"]
        assert not source.other_splits


def test_evaluation_reads_validation_before_test_before_train(hub):
    put(hub, "train.jsonl", "test.jsonl")
    assert load(Path("owner/name"), splits=TO_EVALUATE).num_records == 4
    train, held_out = split("owner/name", eval="owner/name:default/test")
    assert held_out
    assert (train.num_records, held_out.num_records) == (3, 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "owner/nam",
            "the hub has no data set of that name, or a private one; correct",
        ),
        (
            "owner/gated",
            "it is gated: ask for access at http.*/datasets/owner/gated, then",
        ),
        ("owner/name@v7", "datasets/owner/name has no revision v7"),
        (
            "owner/name:chats",
            "no configuration 'chats'; did you mean 'chat'.* one, two",
        ),
        ("owner/two", "has the configurations a, b; name one, such as owner/two:a"),
        (
            "owner/name:chat",
            r"none is named train; name one, such as owner/name:chat/tr",
        ),
        ("owner/name:chat/train_stf", "no split 'train_stf'; did you mean 'train_sft'"),
        ("owner/pictures", "no data files .* try owner/pictures@refs/convert/parquet"),
        ("owner/plain:de", "no configurations, and no folder 'de'"),
        ("owner/folders:fr", "no configurations, and no folder 'fr'"),
        ("owner/gone", r"its README names data/\*, which no data file"),
        ("dta/train.jsonl", "no such file or folder; did you mean 'data/train.jsonl'"),
        ("dta/train", "no such local path; did you mean 'data/train.jsonl'"),
    ],
)
def test_what_is_not_there_is_one_message(hub, tmp_path, name, message):
    write_rows_in(tmp_path / "data")
    put(hub, *PARQUET, configs=CONFIGS)
    two = [{"config_name": key, "data_files": "*.jsonl"} for key in "ab"]
    put(hub, "x.jsonl", configs=two, repository="owner/two")
    put(hub, "x.png", "name.py", repository="owner/pictures")
    put(hub, "train.jsonl", repository="owner/plain")
    put(hub, "en/a.jsonl", repository="owner/folders")
    put(hub, "train.jsonl", repository="owner/gated", gated=True)
    gone = [{"config_name": "x", "data_files": "data/*"}]
    put(hub, "train.jsonl", configs=gone, repository="owner/gone")
    with pytest.raises(UsageError, match=message) as error:
        find_data_sources(name)
    assert "\n" not in str(error.value)


def write_rows_in(folder: Path) -> None:
    folder.mkdir()
    write_rows(folder / "train.jsonl", [{"text": "x"}])


@pytest.mark.parametrize(
    "configs",
    [
        {"config_name": "x"},
        ["x"],
        [{"config_name": "x", "data_files": 3}],
        [{"config_name": "x", "data_files": [{"split": 3, "path": "*"}]}],
        [{"config_name": "x", "data_files": [{"split": "train"}]}],
    ],
)
def test_readme_that_names_no_files_is_corrupt(hub, configs):
    put(hub, "train.jsonl", configs=configs)
    with pytest.raises(CorruptError, match="README"):
        find_data_sources("owner/name")


def test_what_was_fetched_is_read_while_the_hub_does_not_answer(hub, monkeypatch):
    put(hub, "train.jsonl", "validation.jsonl", "test.jsonl")
    expected = load(Path("owner/name"))
    list_data_set.cache_clear()
    answer_at(monkeypatch, "http://127.0.0.1:9")
    found = load(Path("owner/name"))
    assert (found.fingerprint, found.revisions) == (
        expected.fingerprint,
        expected.revisions,
    )
    for name, reason in {
        "owner/name:default/test": "does not answer",
        "owner/other": r"the hub \(http://127.0.0.1:9\) does not answer: .*try again",
    }.items():
        with pytest.raises(JloraError, match=reason):
            find_data_sources(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="run `hf download owner/other --repo-type da"):
        find_data_sources("owner/other")


def test_path_beside_a_folder_is_not_asked_for(hub, tmp_path):
    (tmp_path / "owner").mkdir()
    put(hub, "train.jsonl")
    with pytest.raises(UsageError, match=r"beside the folder .* give owner/name@main"):
        find_data_sources("owner/name")
    assert not hub.asked
    assert find_data_sources("owner/name@main")[0].hub


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("data/*.jsonl", "data/a.jsonl", "data/b/a.jsonl"),
        ("**/train-*.parquet", "train-0.parquet", "train-/0.parquet"),
        ("**/train-*.parquet", "a/b/train-0.parquet", "a/b/strain-0.parquet"),
        ("a/**", "a/b/c.csv", "b/a/c.csv"),
        ("part-?.csv", "part-1.csv", "part-12.csv"),
        ("a.csv", "a.csv", "abcsv"),
    ],
)
def test_patterns_of_files(pattern: str, matching: str, other: str) -> None:
    assert hub_data._matches(pattern, matching)
    assert not hub_data._matches(pattern, other)


def test_no_pattern_of_a_stranger_takes_long() -> None:
    assert not hub_data._matches("**a" * 20 + "b", "a" * 200 + ".jsonl")
