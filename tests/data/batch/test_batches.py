import subprocess
import sys

import numpy as np
import pytest
from helpers.data_cases import chat, load, make_tokenizer, write_rows

from jlora.errors import UsageError

WORDS = ["the", "sum", "of two", "numbers is", "five", "What is the sum?", "a" * 20]


@pytest.fixture
def path(tmp_path):
    rows = [chat(f"{w} {i}", w * (1 + i % 3)) for i in range(5) for w in WORDS]
    return write_rows(tmp_path / "data.jsonl", rows)


def epoch(data, number=0) -> list[dict[str, np.ndarray]]:
    steps = data.steps_per_epoch
    assert steps > 0
    return [data.batch(step) for step in range(number * steps, (number + 1) * steps)]


def documents(
    batches,
) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """(tokens, supervised targets, positions) of every document, in order."""
    found = []
    for batch in batches:
        for row in range(len(batch["tokens"])):
            segments = batch["segment_ids"][row]
            for segment in range(1, segments.max() + 1):
                here = segments == segment
                counted = here & (batch["loss_mask"][row] > 0)
                found.append(
                    (
                        tuple(batch["tokens"][row, here].tolist()),
                        tuple(batch["targets"][row, counted].tolist()),
                        tuple(batch["positions"][row, here].tolist()),
                    )
                )
    return found


def expected_documents(data) -> list[tuple[tuple[int, ...], ...]]:
    found = []
    for index in range(data.num_records):
        tokens, mask = data.record(index)
        supervised = tokens[mask > 0]
        found.append(
            (
                tuple(tokens.tolist()),
                tuple(supervised.tolist()),
                tuple(range(len(tokens))),
            )
        )
    return found


LAYOUTS = pytest.mark.parametrize("packing", [False, True])


@LAYOUTS
@pytest.mark.parametrize("shuffle", [False, True])
def test_epoch_holds_every_record_once_with_its_targets(path, packing, shuffle):
    data = load(path, packing=packing, shuffle=shuffle, batch_size=4, seq_len=128)
    assert sorted(documents(epoch(data))) == sorted(expected_documents(data))


def test_records_keep_their_order_without_shuffle(path):
    data = load(path, batch_size=4)
    assert documents(epoch(data)) == expected_documents(data)


@LAYOUTS
def test_shapes_and_dtypes_are_the_same_in_every_batch(path, packing):
    data = load(path, packing=packing, batch_size=4, seq_len=128)
    expected = {
        "tokens": "int32",
        "targets": "int32",
        "loss_mask": "float32",
        "segment_ids": "int32",
        "positions": "int32",
    }
    for batch in epoch(data):
        assert {key: str(value.dtype) for key, value in batch.items()} == expected
        assert {value.shape for value in batch.values()} == {(4, data.row_length)}


@LAYOUTS
def test_batch_depends_on_seed_and_step_alone(path, packing):
    config = {"packing": packing, "shuffle": True, "batch_size": 4, "seq_len": 128}
    used, fresh = load(path, **config), load(path, **config)
    for step in (9, 0, 3):
        used.batch(step)
    np.testing.assert_equal(used.batch(7), fresh.batch(7))


@LAYOUTS
def test_epochs_and_seeds_differ_in_order(path, packing):
    config = {"packing": packing, "shuffle": True, "batch_size": 4, "seq_len": 128}
    data = load(path, seed=0, **config)
    orders = [
        documents(epoch(data, 0)),
        documents(epoch(data, 1)),
        documents(epoch(load(path, seed=1, **config))),
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_order_is_the_same_in_another_process(path):
    data = load(path, shuffle=True, batch_size=4)
    code = (
        "import sys; sys.path[:0] = ['tests', '.']\n"
        "from pathlib import Path\nfrom helpers.data_cases import load\n"
        f"data = load(Path({str(path)!r}), shuffle=True, batch_size=4)\n"
        "print(data.fingerprint, data.batch(5)['tokens'].sum(axis=1).tolist())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    sums = data.batch(5)["tokens"].sum(axis=1).tolist()
    assert out.stdout.strip() == f"{data.fingerprint} {sums}"


def test_last_batch_is_filled_with_rows_of_padding(path):
    data = load(path, batch_size=4)
    last = data.batch(data.steps_per_epoch - 1)
    assert data.num_rows % 4 == 3
    assert not last["loss_mask"][3].any()
    assert not last["segment_ids"][3].any()


@LAYOUTS
def test_padding_is_masked_and_of_segment_zero(path, packing):
    tokenizer = make_tokenizer(pad_token="<unk>")
    data = load(path, tokenizer, packing=packing, seq_len=128)
    assert any((batch["segment_ids"] == 0).any() for batch in epoch(data))
    for batch in epoch(data):
        padding = batch["segment_ids"] == 0
        assert not batch["loss_mask"][padding].any()
        assert not batch["positions"][padding].any()
        assert set(batch["tokens"][padding].tolist()) <= {tokenizer.pad_id}


def test_end_of_turn_is_supervised_even_if_it_is_the_pad_token(path):
    tokenizer = make_tokenizer(pad_token="<|im_end|>")
    batch = load(path, tokenizer).batch(0)
    assert (batch["targets"][batch["loss_mask"] > 0] == tokenizer.eos_id).any()


@LAYOUTS
def test_last_position_of_a_document_predicts_nothing(path, packing):
    data = load(path, packing=packing, seq_len=128, train_on="all")
    for batch in epoch(data):
        segments = batch["segment_ids"]
        following = np.pad(segments[:, 1:], ((0, 0), (0, 1)))
        assert not batch["loss_mask"][segments != following].any()


@LAYOUTS
def test_supervised_targets_add_up(path, packing):
    data = load(path, packing=packing, seq_len=128)
    assert sum(b["loss_mask"].sum() for b in epoch(data)) == data.num_supervised


def test_packing_needs_fewer_rows(path):
    packed = load(path, packing=True, seq_len=128)
    assert packed.num_rows < load(path).num_rows
    assert packed.num_records == load(path).num_records


def test_rows_are_no_longer_than_needed_without_packing(path):
    longest = int(load(path).lengths.max())
    assert 64 < longest <= 128
    assert load(path, seq_len=512).row_length == 128


def test_rows_are_never_longer_than_seq_len(path):
    assert load(path, seq_len=70).row_length == 70


def test_packed_rows_have_seq_len_tokens(path):
    assert load(path, packing=True, seq_len=512).row_length == 512


def test_fingerprint_depends_on_the_mask(path):
    assert load(path).fingerprint != load(path, train_on="all").fingerprint


def test_fingerprint_does_not_depend_on_the_layout(path):
    assert load(path).fingerprint == load(path, packing=True).fingerprint


def test_negative_seed_is_a_usage_error(path):
    with pytest.raises(UsageError, match="seed=-1"):
        load(path, seed=-1)


def test_thousands_of_records_take_seconds(tmp_path):
    rows = [chat(f"What is the sum of {i} and two?", "five " * 20) for i in range(3000)]
    data = load(write_rows(tmp_path / "data.jsonl", rows), batch_size=8)
    assert data.steps_per_epoch == 375


@LAYOUTS
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_parts_of_any_number_of_processes_make_the_same_batch(path, packing, processes):
    data = load(path, packing=packing, shuffle=True, batch_size=4, seq_len=128)
    share = 4 // processes
    for step in range(data.steps_per_epoch + 1):
        parts = [
            data.batch(step, slice(p * share, (p + 1) * share))
            for p in range(processes)
        ]
        whole = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        np.testing.assert_equal(whole, data.batch(step))
