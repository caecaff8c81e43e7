import pytest
from helpers.data_cases import load, make_tokenizer, write_rows

from jlora.config.run_config import DataConfig
from jlora.data.batch.load_dataset import load_split
from jlora.data.read.splits import TO_EVALUATE, group_by_split
from jlora.errors import UsageError

# The names that datasets infers, of lists of files (load_dataset of a folder).
CASES = {
    ("train.jsonl", "valid.jsonl", "test.jsonl"): {
        "train": ["train.jsonl"],
        "validation": ["valid.jsonl"],
        "test": ["test.jsonl"],
    },
    ("my-train_0.json", "x.dev.json", "evaluation.json"): {
        "train": ["my-train_0.json"],
        "validation": ["x.dev.json"],
        "test": ["evaluation.json"],
    },
    ("training/a.jsonl", "my_val/b.jsonl", "en/testing/c.jsonl"): {
        "train": ["training/a.jsonl"],
        "validation": ["my_val/b.jsonl"],
        "test": ["en/testing/c.jsonl"],
    },
    (
        "data/train_sft-00000-of-00002.parquet",
        "data/train_sft-00001-of-00002-a1b2.parquet",
        "data/test_sft-00000-of-00001.parquet",
        "old/train.jsonl",
    ): {
        "train_sft": [
            "data/train_sft-00000-of-00002.parquet",
            "data/train_sft-00001-of-00002-a1b2.parquet",
        ],
        "test_sft": ["data/test_sft-00000-of-00001.parquet"],
    },
    ("trainer.jsonl", "contest.jsonl", "Train.jsonl", "a.jsonl"): {},
}


@pytest.mark.parametrize("names", CASES)
def test_splits_are_those_of_datasets(names):
    assert group_by_split(names) == CASES[names]


def test_name_of_two_splits_is_a_usage_error():
    with pytest.raises(UsageError, match="of the splits train, test by its name"):
        group_by_split(["train-test.jsonl"])


def text(word: str, count: int) -> list[dict[str, str]]:
    return [{"text": f"{word} {i}"} for i in range(count)]


def make(folder, *names: str):
    """Data files of 3, 4, 5, ... records."""
    for count, name in enumerate(names, start=3):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(folder / name, text(name, count))
    return folder


def split(train, **config):
    config = DataConfig(train=str(train), **config)
    return load_split(make_tokenizer(), config, vocab_size=500, batch_size=2, seed=0)


LAYOUTS = [
    ("train.jsonl", "validation.jsonl", "test.jsonl"),
    ("train/a.jsonl", "dev/a.jsonl", "test/a.jsonl"),
    *[
        tuple(
            f"{folder}{name}-00000-of-00001.jsonl" for name in ("train", "val", "test")
        )
        for folder in ("", "data/")
    ],
    ("default/train/0.jsonl", "default/validation/0.jsonl", "default/test/0.jsonl"),
    ("mine.jsonl", "val.jsonl", "test.jsonl"),
]


@pytest.mark.parametrize("names", LAYOUTS)
def test_train_is_trained_on_validation_evaluated_and_test_untouched(tmp_path, names):
    data, held_out = split(make(tmp_path, *names))
    assert held_out
    assert (data.num_records, held_out.num_records) == (3, 4)
    said = [line for line in data.summary if "the split" in line]
    assert len(said) == 1
    assert "train is trained on" in said[0]
    assert "evaluated on, test not read" in said[0]


def test_test_split_is_not_taken_for_validation(tmp_path):
    data, held_out = split(make(tmp_path, "train.jsonl", "test.jsonl"))
    assert (data.num_records, held_out) == (3, None)


def test_held_out_share_or_given_data_leave_the_validation_split(tmp_path):
    make(tmp_path, "train.jsonl", "validation.jsonl", "more.txt")
    data, held_out = split(tmp_path, eval_fraction=0.34)
    assert held_out
    assert (data.num_records, held_out.num_records) == (2, 1)
    other = write_rows(tmp_path / "more.txt", text("x", 7))
    data, held_out = split(tmp_path, eval=str(other))
    assert held_out
    assert (data.num_records, held_out.num_records) == (3, 7)
    assert any("validation not read" in line for line in data.summary)


def test_folder_above_data_works(tmp_path):
    make(tmp_path, "data/a.jsonl", "data/b.jsonl")
    assert split(tmp_path)[0].num_records == 7


def test_folder_without_split_names_is_read_whole(tmp_path):
    make(tmp_path, "a.jsonl", "b.jsonl", "more/c.jsonl")
    data, held_out = split(tmp_path)
    assert (data.num_records, held_out) == (7, None)
    assert not any("the split" in line for line in data.summary)


def test_splits_without_train_are_a_usage_error(tmp_path):
    make(
        tmp_path,
        "data/train_sft-00000-of-00001.jsonl",
        "data/test-00000-of-00001.jsonl",
    )
    with pytest.raises(UsageError, match=r"splits (test, train_sft|train_sft, test)"):
        split(tmp_path)


def test_evaluation_reads_validation_before_test_before_train(tmp_path):
    def evaluated() -> int:
        return load(tmp_path, splits=TO_EVALUATE).num_records

    make(tmp_path, "train.jsonl")
    assert evaluated() == 3
    make(tmp_path, "train.jsonl", "test.jsonl")
    assert evaluated() == 4
    make(tmp_path, "train.jsonl", "test.jsonl", "valid.jsonl")
    assert evaluated() == 5
    data, held_out = split(
        write_rows(tmp_path / "x.txt", text("x", 6)), eval=str(tmp_path)
    )
    assert held_out
    assert (data.num_records, held_out.num_records) == (6, 5)
    assert f"{tmp_path}: the split validation is read" in held_out.summary[0]


def test_file_in_training_and_evaluation_is_a_usage_error(tmp_path):
    make(tmp_path, "a.jsonl", "b.jsonl")
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    for name in ("a.jsonl", "link.jsonl", "*.jsonl"):
        with pytest.raises(UsageError, match=r"in data\.train and in"):
            split(tmp_path / "a.jsonl", eval=str(tmp_path / name))
    assert split(tmp_path / "a.jsonl", eval=str(tmp_path / "b.jsonl"))[1] is not None
