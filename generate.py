"""Text from a model, with or without an adapter: one completion, or a chat."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from jlora.cli.command import run_command
from jlora.cli.printing import unescaped_output
from jlora.cli.process_setup import keep_compiled
from jlora.config.run_config import ModelConfig, check_seed
from jlora.errors import UsageError

NEW_TOKENS = 256


@dataclass(frozen=True)
class Arguments(ModelConfig):
    """Complete a prompt, or chat."""

    prompt: str | None = None
    """Text to continue; with --chat, the one message to answer."""
    chat: bool = False
    """Use the chat template; without --prompt, read messages from the keyboard."""
    max_new_tokens: int | None = None
    """Stop after this many tokens; null: after 256, or when the model's positions are full."""
    temperature: float = 0.0
    """0 takes the most likely token; higher is more random."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        super().__post_init__()
        check_seed(self.seed)
        if self.prompt is None and not self.chat:
            raise UsageError("give --prompt TEXT, or --chat")
        tokens = 1 if self.max_new_tokens is None else self.max_new_tokens
        if tokens < 1 or not (self.temperature == 0 or 1e-6 <= self.temperature <= 1e6):
            raise UsageError(
                f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature}; "
                "expected at least 1 token and a temperature of 0, or from 1e-6 to 1e6"
            )


def main(args: Arguments) -> None:
    """Loads the model, then completes the prompt or answers each message."""
    # What needs JAX is imported here: --help and a wrong flag are answered without it.
    from jlora.data.tokenize.tokenizer import Tokenizer
    from jlora.formats.load_params import load_params
    from jlora.formats.open_model import open_model
    from jlora.formats.peft.adapter_placement import adapted_config
    from jlora.formats.peft.attach_adapter import attach_adapter
    from jlora.loading import open_adapter
    from jlora.model.generation import generate_tokens
    from jlora.model.llama import Llama
    from jlora.ops.compute_choices import choose_dtype, default_platform

    source = open_model(args.model)
    keep_compiled()
    config, params = source.config, load_params(source)
    if args.adapter is not None:
        adapter = open_adapter(args.adapter, args.step)
        params = attach_adapter(params, config, adapter)
        config = adapted_config(adapter, config)
    model = Llama(config, choose_dtype(args.dtype, default_platform()))
    tokenizer = Tokenizer(source.files, config)
    sample = partial(
        generate_tokens,
        model,
        params,
        stop_ids=tokenizer.stop_ids,
        temperature=args.temperature,
        seed=args.seed,
    )

    def complete(tokens: list[int]) -> str:
        count = count_new_tokens(args, len(tokens), config.longest)
        return print_text(sample(tokens, max_new_tokens=count), tokenizer.decode)

    if args.prompt is not None and not args.chat:
        complete(tokenizer.encode(args.prompt, add_bos=True))
        return
    messages: list[dict[str, str]] = []
    for message in [args.prompt] if args.prompt is not None else read_messages():
        messages.append({"role": "user", "content": message})
        tokens = tokenizer.encode_chat(messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": complete(tokens)})


def read_messages() -> Iterator[str]:
    """Yields the lines typed, until the end of the input or an empty line."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


def count_new_tokens(args: Arguments, used: int, longest: int) -> int:
    """Returns how many tokens to generate after `used`, in a model of `longest` positions.

    Raises:
        UsageError: the conversation has no room left.
    """
    room = longest - used
    if room < 1 and args.chat:
        raise UsageError(
            f"the conversation has {used} tokens and the model takes {longest}; "
            "start a new one"
        )
    wanted = args.max_new_tokens
    if wanted is None or (args.chat and args.prompt is None):
        return max(1, min(wanted or NEW_TOKENS, room))
    return wanted


def print_text(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> str:
    """Prints the text of tokens as they come; returns it."""
    new: list[int] = []
    shown = ""
    # A file or another program gets the text as it is.
    output = sys.stdout if sys.stdout.isatty() else unescaped_output()
    for token in tokens:
        new.append(token)
        text = decode(new)
        if not text.endswith("\ufffd"):  # half a character; wait for the rest
            print(text[len(shown) :], end="", flush=True, file=output)
            shown = text
    text = decode(new)
    print(text[len(shown) :], flush=True, file=output)
    return text


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
