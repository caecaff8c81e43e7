"""Text from a model, in one call: `jlora.generate`, and the tokens of one prompt."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jlora.config.sampling_config import SamplingConfig, TextConfig
from jlora.errors import UsageError
from jlora.lora.adapter_tree import Params
from jlora.model.decoding.engine import Row
from jlora.model.decoding.text_stream import TextStream
from jlora.model.decoding.token_rows import Generation, sample_key
from jlora.model.llama import Llama


@runtime_checkable
class TextTokenizer(Protocol):
    """What `generate` needs of `jlora.data.Tokenizer`."""

    stop_ids: frozenset[int]

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Returns the ids of plain text."""
        ...

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
    ) -> list[int]:
        """Returns the ids of a conversation in the model's chat template."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        ...


def generate(
    model: Llama,
    params: Params,
    tokenizer: TextTokenizer | None,
    prompt: str | Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop_strings: Sequence[str] = (),
    seed: int = 0,
) -> str:
    """Returns the text that continues a prompt, or the answer to a conversation.

    An adapter that is not merged (`jlora.merge`) makes every step slower.

    Args:
        model: as `jlora.load` returns it, as are `params` and `tokenizer`.
        params: of the model, with or without an adapter.
        tokenizer: of the model.
        prompt: text to continue, or messages such as
            [{"role": "user", "content": "Hello"}].
        max_new_tokens: None: 256, or as many as the model has room for.
        temperature: 0 takes the most likely token; higher is more random.
        top_k: draws from so many of the most likely tokens; 0: from all.
        top_p: draws from the fewest tokens that together are this likely.
        min_p: leaves out tokens less likely than this share of the most likely one's.
        repetition_penalty: divides the score of tokens that have occurred.
        stop_strings: texts before which the answer ends.
        seed: of the sampling.

    Raises:
        UsageError: the prompt is empty or too long, a value is out of range, or there is no
            tokenizer.
        UnsupportedError: it is longer than the model's attention window.
    """
    if tokenizer is None:
        raise UsageError("the model has no tokenizer.json, which text needs")
    if isinstance(prompt, str):
        tokens = tokenizer.encode(prompt, add_bos=True)
    else:
        tokens = tokenizer.encode_chat(prompt, add_generation_prompt=True)
    settings = TextConfig(
        repetition_penalty=repetition_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    count = settings.count(len(tokens), model.config.longest)
    stream, text = TextStream(tokenizer.decode, stop_strings), ""
    for token in generate_tokens(
        model,
        params,
        tokens,
        max_new_tokens=count,
        stop_ids=tokenizer.stop_ids,
        sampling=settings,
        seed=seed,
    ):
        text += stream.add(token)
        if stream.is_stopped:
            break
    return text + stream.end()


def generate_tokens(
    model: Llama,
    params: Params,
    prompt: list[int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int] = frozenset(),
    sampling: SamplingConfig | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yields up to `max_new_tokens` token ids that follow the prompt.

    Stops before a stop id, which is not yielded. Without `sampling`, each is the most
    likely token. What is drawn follows from (seed, number of the token).

    Raises:
        UsageError: no prompt, or more positions than the model was made for.
        UnsupportedError: more tokens than its attention window.
    """
    row = Row(prompt, sampling or SamplingConfig(), sample_key(seed))
    rows = Generation(model, params, [row], [max_new_tokens], stop_ids)
    for [tokens] in rows:
        yield from tokens
