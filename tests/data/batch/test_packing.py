import numpy as np
import pytest

from jlora.data.batch.packing import best_fit, one_per_row, pack_documents


def falling(lengths) -> np.ndarray:
    return -np.sort(-np.asarray(lengths))


def make_lengths(seed: int, capacity: int, count: int = 200) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return falling(rng.integers(1, capacity + 1, count))


def chat_lengths(median: float, capacity: int, count: int = 20_000) -> np.ndarray:
    """Lengths as published instruction sets have them: log-normal, cut at a row."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(median), 0.8, count).astype(int)
    return falling(np.clip(drawn, 8, capacity))


def slow_best_fit(lengths, capacity: int) -> list[int]:
    """Room left in each row after placing one length at a time, by plain search."""
    rooms: list[int] = []
    for length in lengths.tolist():
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return sorted(rooms)


def sums(packing, lengths) -> list[int]:
    return [int(lengths[packing.row(i)].sum()) for i in range(packing.num_rows)]


def fill(packing, lengths, capacity: int) -> float:
    return lengths.sum() / (packing.num_rows * capacity)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("capacity", [1, 2, 7, 8, 9, 64, 1000])
def test_rooms_equal_those_of_a_plain_best_fit(seed, capacity):
    lengths = make_lengths(seed, capacity)
    packing = best_fit(lengths, capacity, capacity)
    rooms = sorted(capacity - total for total in sums(packing, lengths))
    assert rooms == slow_best_fit(lengths, capacity)


@pytest.mark.parametrize("limit", [1, 3, 8, 100])
def test_every_document_is_in_exactly_one_row(limit):
    packing = best_fit(make_lengths(0, 100), 100, limit)
    assert sorted(packing.documents.tolist()) == list(range(200))


@pytest.mark.parametrize("limit", [1, 3, 8, 100])
def test_no_row_overflows_or_exceeds_the_limit(limit):
    lengths = falling(np.append(make_lengths(1, 100), np.ones(300, int)))
    packing = best_fit(lengths, 100, limit)
    assert max(sums(packing, lengths)) <= 100
    assert packing.max_documents <= limit


def test_packing_is_the_same_twice():
    lengths = make_lengths(2, 100)
    first, second = pack_documents(lengths, 100), pack_documents(lengths, 100)
    np.testing.assert_array_equal(first.documents, second.documents)
    np.testing.assert_array_equal(first.starts, second.starts)


def test_document_goes_into_the_fullest_row_with_room():
    packing = best_fit(np.array([7, 6, 3, 3]), 10, 10)
    assert [packing.row(i).tolist() for i in range(2)] == [[0, 2], [1, 3]]


@pytest.mark.parametrize("capacity", [1024, 2048, 4096])
@pytest.mark.parametrize("median", [60, 90, 250, 600])
def test_rows_of_a_realistic_mix_are_98_percent_full(median, capacity):
    lengths = chat_lengths(median, capacity)
    assert fill(pack_documents(lengths, capacity), lengths, capacity) >= 0.98


@pytest.mark.parametrize(("median", "most"), [(60, 128), (90, 64), (250, 32)])
def test_no_row_holds_many_more_documents_than_the_mean(median, most):
    lengths = chat_lengths(median, 4096)
    assert best_fit(lengths, 4096, 4096).max_documents > 2 * most
    assert pack_documents(lengths, 4096).max_documents <= most


def test_limit_costs_at_most_one_percent_of_the_rows():
    lengths = make_lengths(4, 1000, count=3000)
    loosest = best_fit(lengths, 1000, 1000).num_rows
    assert pack_documents(lengths, 1000).num_rows <= 1.01 * loosest


def test_unlimited_rows_of_one_token_documents_are_full():
    packing = pack_documents(np.ones(64, int), 16)
    assert packing.num_rows == 4


def test_hundred_thousand_documents_take_a_second():
    lengths = make_lengths(3, 4096, count=100_000)
    assert pack_documents(lengths, 4096).num_rows < 55_000


def test_one_document_per_row_without_packing():
    assert [one_per_row(3).row(i).tolist() for i in range(3)] == [[0], [1], [2]]


@pytest.mark.parametrize("lengths", [[11], [0], [3, 4], [3, -1]])
def test_lengths_that_do_not_fit_or_fall_are_an_error(lengths):
    with pytest.raises(ValueError, match="length"):
        pack_documents(np.array(lengths), 10)
