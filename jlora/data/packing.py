"""Several documents in one row: best fit decreasing."""

from collections.abc import Sequence


def pack_documents(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns bins of indices into `lengths`, which must not increase.

    Each document goes into the fullest bin that has room for it, a new one otherwise;
    none is split. Depends on the lengths alone, in O(n log capacity).
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = _SortedRooms(capacity)
    previous = capacity
    for index, length in enumerate(lengths):
        if not 0 < length <= previous:
            raise ValueError(f"length {length} after {previous}; expected falling ones")
        previous = length
        room = rooms.smallest_from(length)
        if room is None:
            room, place = capacity, len(bins)
            bins.append([])
        else:
            place = by_room[room].pop()
            if not by_room[room]:
                rooms.remove(room)
        bins[place].append(index)
        left = room - length
        if left:
            by_room[left].append(place)
            rooms.add(left)
    return bins


class _SortedRooms:
    """A set of integers 0..largest that finds the next one upwards; a binary tree."""

    def __init__(self, largest: int) -> None:
        self._leaves = 1 << largest.bit_length()
        # Node k has the children 2k and 2k + 1; a node is true if a leaf below is.
        self._tree = bytearray(2 * self._leaves)

    def add(self, value: int) -> None:
        node = self._leaves + value
        while node and not self._tree[node]:
            self._tree[node] = 1
            node //= 2

    def remove(self, value: int) -> None:
        node = self._leaves + value
        self._tree[node] = 0
        while node > 1 and not self._tree[node ^ 1]:
            node //= 2
            self._tree[node] = 0

    def smallest_from(self, value: int) -> int | None:
        """Returns the smallest member >= value."""
        node = self._leaves + value
        while not self._tree[node]:
            # Up until there is a right neighbour, then over to it.
            while node & 1:
                node //= 2
            if node == 0:
                return None
            node += 1
        while node < self._leaves:
            node *= 2
            if not self._tree[node]:
                node += 1
        return node - self._leaves
