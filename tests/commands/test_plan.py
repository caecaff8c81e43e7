import pytest
from helpers.commands import succeed, train_flags
from helpers.data_cases import write_rows

pytestmark = pytest.mark.usefixtures("in_workdir")


def test_plan_reads_no_weights_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jlora.formats.load_params.load_params", pytest.fail)
    out = succeed("train", *train_flags(tmp_path / "run", "--plan"))
    assert out.startswith("trainable params: 7,424")
    for text in (
        "activations",
        "tokens per record",
        "What is a?{+ It is a.[[<|im_end|>]]+}",
    ):
        assert text in out
    assert not (tmp_path / "run").exists()


def test_plan_continues_an_adapter(run, tmp_path):
    flags = train_flags(tmp_path / "new", "--plan", "--init_adapter", run)
    assert succeed("train", *flags).startswith("trainable params: 7,424")


def test_without_a_length_packed_rows_are_as_long_as_the_model_allows(tmp_path):
    flags = [str(flag) for flag in train_flags(tmp_path / "run")]
    at = flags.index("--data.seq_len")
    del flags[at : at + 2]
    assert " x 128 tokens" in succeed("train", *flags, "--plan", "--data.packing")


def test_without_a_length_a_record_is_cut_where_the_model_ends(tmp_path):
    write_rows(tmp_path / "long.jsonl", [{"text": "What is a? " * 100}] * 8)
    flags = [
        *("--model", "hf", "--output_dir", tmp_path / "run", "--plan"),
        *("--data.train", tmp_path / "long.jsonl"),
    ]
    assert " x 128 tokens" in succeed("train", *flags)


def test_a_plan_says_whether_it_fits(tmp_path):
    fits = succeed("train", *train_flags(tmp_path / "run", "--plan"))
    assert "GiB: fits\n" in fits
    flags = train_flags(tmp_path / "run", "--plan", "--train.batch_size", 8 * 10**7)
    assert "GiB: does not fit; use fewer rows" in succeed("train", *flags)
