import itertools
import random

import pytest

from jlora.data.packing import pack_documents


def make_lengths(seed: int, capacity: int, count: int = 200) -> list[int]:
    rng = random.Random(seed)
    return sorted((rng.randint(1, capacity) for _ in range(count)), reverse=True)


def slow_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each bin after placing one length at a time, by plain search."""
    rooms: list[int] = []
    for length in lengths:
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("capacity", [1, 2, 7, 8, 9, 64, 1000])
def test_rooms_equal_those_of_a_plain_best_fit(seed, capacity):
    lengths = make_lengths(seed, capacity)
    bins = pack_documents(lengths, capacity)
    rooms = sorted(capacity - sum(lengths[i] for i in bin) for bin in bins)
    assert rooms == slow_best_fit(lengths, capacity)


def test_every_document_is_in_exactly_one_bin():
    bins = pack_documents(make_lengths(0, 100), 100)
    assert sorted(itertools.chain.from_iterable(bins)) == list(range(200))


def test_no_bin_overflows():
    lengths = make_lengths(1, 100)
    assert all(
        sum(lengths[i] for i in bin) <= 100 for bin in pack_documents(lengths, 100)
    )


def test_plan_is_the_same_twice():
    lengths = make_lengths(2, 100)
    assert pack_documents(lengths, 100) == pack_documents(lengths, 100)


def test_document_goes_into_the_fullest_bin_with_room():
    assert pack_documents([7, 6, 3, 3], 10) == [[0, 2], [1, 3]]


def test_hundred_thousand_documents_take_seconds():
    lengths = make_lengths(3, 4096, count=100_000)
    assert len(pack_documents(lengths, 4096)) < 55_000


@pytest.mark.parametrize("lengths", [[11], [0], [3, 4]])
def test_lengths_that_do_not_fit_or_fall_are_an_error(lengths):
    with pytest.raises(ValueError, match="length"):
        pack_documents(lengths, 10)
