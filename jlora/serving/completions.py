"""Prompts to texts: several at once, as they come, with their speed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jlora.config.sampling_config import TextConfig
from jlora.loading import TextModel
from jlora.model.decoding.engine import Row
from jlora.model.decoding.text_stream import TextStream
from jlora.model.decoding.token_rows import (
    Generation,
    KeptCache,
    check_room,
    sample_key,
)


@dataclass
class Speed:
    """Tokens and times of some generated texts."""

    tokens: int = 0
    began: float = field(default_factory=time.perf_counter)
    first: float | None = None
    ended: float = 0.0

    def count(self, tokens: int) -> None:
        """Counts tokens that have come just now."""
        self.ended = time.perf_counter()
        self.first = self.ended if self.first is None else self.first
        self.tokens += tokens

    def line(self) -> str:
        """Returns the figures for the user; the rate is that after the first token."""
        if self.first is None:
            return "no tokens"
        later = self.ended - self.first
        rate = f", {(self.tokens - 1) / later:.1f} tokens/s" if later > 0 else ""
        word = "token" if self.tokens == 1 else "tokens"
        return f"{self.tokens:,} {word}{rate}, the first after {self.first - self.began:.2f} s"


def complete(
    loaded: TextModel,
    prompts: Sequence[tuple[list[int], int, int]],
    settings: TextConfig,
    *,
    show: Callable[[str], None] | None = None,
    speed: Speed | None = None,
    kept: KeptCache | None = None,
) -> list[str]:
    """Returns the texts that continue prompts, generated together.

    Args:
        loaded: the model.
        prompts: (ids, number of the prompt, number of the sample), by which the seed of
            a text is chosen, whatever else is generated with it.
        settings: how to continue them.
        show: is given every part of the first text as soon as it is certain.
        speed: counts the tokens.
        kept: what is known of an earlier text that the only prompt may begin with.

    Raises:
        UsageError: an empty prompt, or more positions than the model was made for.
        KeyboardInterrupt: while generating; what was shown stays shown.
    """
    model, params, tokenizer = loaded
    longest = model.config.longest
    counts = [settings.count(len(ids), longest) for ids, _, _ in prompts]
    for (ids, _, _), count in zip(prompts, counts, strict=True):
        check_room(model.config, len(ids), count)
    rows = [
        Row(ids, settings, sample_key(settings.seed, prompt, sample))
        for ids, prompt, sample in prompts
    ]
    generation = Generation(model, params, rows, counts, tokenizer.stop_ids, kept)
    streams = [TextStream(tokenizer.decode, settings.stop_strings) for _ in rows]
    texts = [""] * len(rows)
    for new in generation:
        if speed is not None:
            speed.count(sum(map(len, new)))
        for row, tokens in enumerate(new):
            part = "".join(map(streams[row].add, tokens))
            if streams[row].is_stopped:
                generation.end(row)
            texts[row] += part
            if show is not None and row == 0:
                show(part)
    ends = [stream.end() for stream in streams]
    if show is not None:
        show(ends[0])
    return [text + end for text, end in zip(texts, ends, strict=True)]
