"""Data as the model reads it, printed for a person to check."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text


def show_samples(samples: Sequence[tuple[str, Sequence[tuple[str, bool]]]]) -> None:
    """Prints records as the model reads them, and marks what is trained on.

    Supervised text is green on a terminal; elsewhere it is between {+ and +}.

    Args:
        samples: of each record its title, and pieces of text with whether the loss
            counts them.
    """
    console = Console(highlight=False, soft_wrap=True)
    for title, pieces in samples:
        text = Text()
        for piece, is_supervised in pieces:
            if console.is_terminal:
                text.append(piece, "bold green" if is_supervised else "dim")
            else:
                text.append(f"{{+{piece}+}}" if is_supervised else piece)
        console.print(Text(title, "bold underline"), text, "", sep="\n")
