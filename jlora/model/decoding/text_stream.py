"""The text of tokens as they come, up to a stop string."""

from collections.abc import Callable, Sequence


class TextStream:
    """Makes text of tokens that come one by one.

    Text is held back while it may still change: half a character, or the beginning of a stop
    string.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()
    ) -> None:
        """Begins an empty text.

        Args:
            decode: returns the text of ids.
            stop: strings that end the text, and are not in it.
        """
        self._decode, self._stop = decode, [text for text in stop if text]
        self._ids: list[int] = []
        # Of `_ids`, those before `_known` are text already; some are decoded again with
        # the new ones, as a token's text depends on those before it.
        self._context = self._known = 0
        self._held = ""
        self.is_stopped = False
        """Whether a stop string was found; what follows is no part of the text."""

    def add(self, token: int) -> str:
        """Returns the text that is certain now, and was not returned before."""
        if self.is_stopped:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._known])
        text = self._decode(self._ids[self._context :])
        if text.endswith("\ufffd"):  # half a character; wait for the rest
            return ""
        self._context, self._known = self._known, len(self._ids)
        return self._release(text[len(before) :], is_last=False)

    def end(self) -> str:
        """Returns what was held back."""
        before = self._decode(self._ids[self._context : self._known])
        text = self._decode(self._ids[self._context :])[len(before) :]
        self._known = self._context = len(self._ids)
        return "" if self.is_stopped else self._release(text, is_last=True)

    def _release(self, text: str, *, is_last: bool) -> str:
        held = self._held + text
        places = [place for stop in self._stop if (place := held.find(stop)) >= 0]
        if places:
            self.is_stopped, self._held = True, ""
            return held[: min(places)]
        kept = 0
        if not is_last:
            kept = max((_overlap(held, stop) for stop in self._stop), default=0)
        cut = len(held) - kept
        self._held = held[cut:]
        return held[:cut]


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of the text begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
