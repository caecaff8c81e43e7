"""What is printed cannot steer a terminal, whatever the files hold that it comes from."""

import sys
from typing import Any

from jlora.errors import printable


class EscapedOutput:
    """A text stream that escapes control characters; all else is the stream's own."""

    def __init__(self, stream: Any) -> None:
        """Wraps a stream."""
        self.unescaped = stream

    def write(self, text: str) -> int:
        """Writes a text without control characters; returns its length."""
        self.unescaped.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.unescaped, name)


def unescaped_output() -> Any:
    """Returns stdout itself, for a library that steers the terminal."""
    return getattr(sys.stdout, "unescaped", sys.stdout)
