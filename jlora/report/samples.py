"""Data as the model reads it, printed for a person to check."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from jlora.cli.printing import unescaped_output
from jlora.errors import printable


def show_samples(
    samples: Sequence[tuple[str, Sequence[tuple[str, bool, bool]]]],
) -> None:
    """Prints records as the model reads them, and marks what is trained on.

    Supervised text is green on a terminal and control tokens are underlined; elsewhere
    they are between {+ and +}, and between [[ and ]].

    Args:
        samples: of each record its title, and pieces of text with whether the loss
            counts them and whether they are one added token.
    """
    console = Console(file=unescaped_output(), highlight=False, soft_wrap=True)
    for title, pieces in samples:
        text = Text()
        was_supervised = False
        for raw, is_supervised, is_token in pieces:
            piece = printable(raw)
            if console.is_terminal:
                style = "bold green" if is_supervised else "dim"
                text.append(piece, f"{style} underline" if is_token else style)
                continue
            if is_supervised != was_supervised:
                text.append("{+" if is_supervised else "+}")
            text.append(f"[[{piece}]]" if is_token else piece)
            was_supervised = is_supervised
        if was_supervised and not console.is_terminal:
            text.append("+}")
        console.print(Text(printable(title), "bold underline"), text, "", sep="\n")
