import numpy as np
import pytest
from helpers.data_cases import load, make_tokenizer, write_rows

from jlora.config.run_config import DataConfig
from jlora.data.batch.load_dataset import load_split
from jlora.data.batch.mixing import content_ranks, hold_out, repeat_records
from jlora.errors import UsageError

ROWS = [{"text": f"the sum of {i}"} for i in range(40)]


@pytest.fixture
def path(tmp_path):
    return write_rows(tmp_path / "data.jsonl", ROWS)


def split(train, seed=0, **config):
    return load_split(
        make_tokenizer(),
        DataConfig(train=train, **config),
        vocab_size=500,
        batch_size=4,
        seed=seed,
    )


def texts(data) -> list[str]:
    tokenizer = make_tokenizer()
    records = (data.record(index)[0] for index in range(data.num_records))
    return [tokenizer.decode(tokens.tolist()) for tokens in records]


def test_held_out_share_is_exact_and_shares_nothing_with_the_rest(path):
    train, held_out = split(str(path), eval_fraction=0.1)
    assert (len(texts(train)), len(texts(held_out))) == (36, 4)
    assert sorted(texts(train) + texts(held_out)) == sorted(r["text"] for r in ROWS)


def test_held_out_records_do_not_depend_on_their_order(tmp_path, path):
    turned = write_rows(tmp_path / "turned.jsonl", ROWS[::-1])
    first = split(str(path), eval_fraction=0.1)[1]
    second = split(str(turned), eval_fraction=0.1)[1]
    assert texts(first) == texts(second)[::-1]


def test_held_out_records_depend_on_the_seed(path):
    first = split(str(path), eval_fraction=0.1)[1]
    second = split(str(path), eval_fraction=0.1, seed=1)[1]
    assert set(texts(first)) != set(texts(second))


def test_copies_of_a_record_are_held_out_together(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", ROWS * 3)
    train, held_out = split(str(path), eval_fraction=0.25)
    assert len(texts(held_out)) == 30
    assert not set(texts(train)) & set(texts(held_out))


def test_held_out_file_is_read_in_order(tmp_path, path):
    held = write_rows(tmp_path / "held.jsonl", ROWS[:3])
    train, held_out = split(str(path), eval=str(held))
    assert texts(held_out) == [r["text"] for r in ROWS[:3]]
    assert len(texts(train)) == 40


def test_nothing_is_held_out_unless_asked_for(path):
    train, held_out = split(str(path))
    assert held_out is None
    assert len(texts(train)) == 40


def test_share_that_leaves_nothing_is_a_usage_error(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", ROWS[:1] * 5)
    with pytest.raises(UsageError, match=r"eval_fraction=0\.1 of 1 different records"):
        split(str(path), eval_fraction=0.1)


def test_fraction_and_file_together_are_a_usage_error():
    with pytest.raises(UsageError, match="both given"):
        DataConfig(eval="a", eval_fraction=0.1)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_fraction_out_of_range_is_a_usage_error(fraction):
    with pytest.raises(UsageError, match="eval_fraction"):
        DataConfig(eval_fraction=fraction)


@pytest.mark.parametrize(
    ("weight", "counts"),
    [
        (1, {1: 40}),
        (2, {2: 40}),
        (0.25, {1: 10}),
        (2.5, {2: 20, 3: 20}),
        (0.001, {1: 1}),
    ],
)
def test_weight_is_the_number_of_passes_per_epoch(tmp_path, path, weight, counts):
    other = write_rows(tmp_path / "other.jsonl", [{"text": "five"}])
    data = load({str(path): weight, str(other): 1})
    found = texts(data)
    assert found.count("five") == 1
    times = [found.count(row["text"]) for row in ROWS]
    assert {n: times.count(n) for n in set(times) - {0}} == counts


def test_mixture_depends_on_seed_and_content_alone(tmp_path, path):
    turned = write_rows(tmp_path / "turned.jsonl", ROWS[::-1])
    first, second = texts(load({str(path): 0.5})), texts(load({str(turned): 0.5}))
    assert first == second[::-1]
    assert set(first) != set(texts(load({str(path): 0.5}, seed=1)))


def test_each_source_has_a_line_of_its_own_in_the_log(tmp_path, path):
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "b"}])
    lines = load({str(path): 0.5, str(other): 3}).summary
    assert (
        f"{path}: format text, the loss counts every token, 40 records, 0.5 passes"
        in lines[0]
    )
    assert f"{other}: format prompt_completion" in lines[1]


def test_weights_apply_to_what_is_not_held_out(path):
    train, held_out = split({str(path): 2.0}, eval_fraction=0.1)
    assert (len(texts(train)), len(texts(held_out))) == (72, 4)


def test_ranks_are_a_function_of_tokens_and_seed():
    records = [np.array(ids, np.int32) for ids in ([1, 2], [1], [1, 2])]
    ranks = content_ranks(records, 3)
    assert ranks[0] == ranks[2] != ranks[1]
    assert (ranks != content_ranks(records, 4)).all()
    assert ranks.tolist() == content_ranks([r[::1] for r in records], 3).tolist()


def test_held_out_share_of_large_data_is_rounded():
    ranks = np.arange(1000, dtype=np.uint64)
    assert hold_out(ranks, 0.0154).sum() == 15


def test_repeated_records_keep_their_order():
    assert repeat_records(np.array([5, 1, 9], np.uint64), 1.4).tolist() == [0, 1, 1, 2]
