"""Text from a model, with or without an adapter: a completion, a file of them, or a chat."""

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jlora.cli.command import run_command
from jlora.cli.process_setup import keep_compiled
from jlora.config.json_fields import MAX_SIZE
from jlora.config.run_config import ModelConfig, TensorConfig
from jlora.config.sampling_config import TextConfig
from jlora.errors import UsageError

if TYPE_CHECKING:
    from jlora.loading import TextModel


@dataclass(frozen=True)
class Arguments(TextConfig, ModelConfig):
    """Complete a prompt or a file of prompts, or chat."""

    prompt: str | None = None
    """Text to continue; with --chat, the one message to answer."""
    messages: str | None = None
    """JSON file with a conversation to answer: [{"role": "user", "content": "..."}]."""
    prompts: str | None = None
    """JSONL file; each {"prompt": "..."} or {"messages": [...]} is printed with its answer."""
    mesh: TensorConfig = dataclasses.field(default_factory=TensorConfig)
    chat: bool = False
    """Use the chat template; alone, talk at the keyboard (as jlora chat does)."""
    system: str | None = None
    """System message that conversations begin with."""
    num_return_sequences: int = 1
    """Samples for each prompt."""
    batch_size: int = 8
    """Texts that are generated together."""

    def __post_init__(self) -> None:
        """Raises UsageError for a value out of range."""
        super().__post_init__()
        ModelConfig.__post_init__(self)
        given = [self.prompt, self.messages, self.prompts]
        if sum(value is not None for value in given) > 1:
            raise UsageError("give one of --prompt, --messages and --prompts")
        if not self.chat and given == [None] * 3:
            raise UsageError(
                "give --prompt TEXT, --messages FILE, --prompts FILE or --chat"
            )
        if self.system is not None and self.prompt is not None and not self.chat:
            raise UsageError("--system is for conversations; add --chat")
        for name in ("num_return_sequences", "batch_size"):
            if not 1 <= getattr(self, name) <= MAX_SIZE:
                raise UsageError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.num_return_sequences > 1:
            if not self.temperature:
                raise UsageError(
                    "num_return_sequences has no effect with temperature=0, as all samples "
                    "would be the same; give a temperature"
                )
            if given == [None] * 3:
                raise UsageError("num_return_sequences has no effect at the keyboard")


def main(args: Arguments) -> None:
    """Loads the model, then answers what the flags give, or what is typed."""
    # What needs JAX is imported here: --help and a wrong flag are answered without it.
    from jlora.loading import load_for_text
    from jlora.serving.chat_session import ChatSession

    records = read_records(args)  # before any weight is read
    keep_compiled()
    if records is None:

        def load(with_adapter: bool) -> "TextModel":
            adapter, step = (args.adapter, args.step) if with_adapter else (None, None)
            asked = dataclasses.replace(args, adapter=adapter, step=step)
            return load_for_text(asked, tensor=args.mesh.tensor)

        has_adapter = args.adapter is not None
        ChatSession(load, args, args.system, has_adapter=has_adapter).run()
        return
    answer_all(args, load_for_text(args, tensor=args.mesh.tensor), records)


def read_records(args: Arguments) -> list[dict[str, Any]] | None:
    """Returns what to answer; None: what will be typed."""
    from jlora.serving.prompt_files import (
        conversation,
        read_messages,
        read_prompts,
        with_system,
    )

    if args.prompts is not None:
        records = read_prompts(args.prompts)
    elif args.messages is not None:
        records = [{"messages": read_messages(args.messages)}]
    elif args.prompt is not None:
        records = [{"prompt": args.prompt}]
    else:
        return None
    if args.system is None:
        return records
    if not args.chat and not all("messages" in record for record in records):
        raise UsageError(
            f"{args.prompts}: holds prompts that are not conversations, on which --system "
            "has no effect; add --chat"
        )
    return [
        {**record, "messages": with_system(conversation(record), args.system)}
        for record in records
    ]


def answer_all(
    args: Arguments, loaded: "TextModel", records: list[dict[str, Any]]
) -> None:
    """Prints the answers: the text of a single one as it comes, of a file line by line."""
    from jlora.serving.chat_session import show_text
    from jlora.serving.completions import Speed, complete
    from jlora.serving.prompt_files import answered, batches, prompt_ids

    ids = [prompt_ids(r, loaded.tokenizer, chat=args.chat) for r in records]
    samples = range(args.num_return_sequences)
    wanted = [(ids[i], i, sample) for i in range(len(ids)) for sample in samples]
    is_single = args.prompts is None and len(wanted) == 1
    speed, texts = Speed(), [""] * len(wanted)
    for batch in batches([len(tokens) for tokens, _, _ in wanted], args.batch_size):
        found = complete(
            loaded,
            [wanted[i] for i in batch],
            args,
            show=show_text if is_single else None,
            speed=speed,
        )
        for i, text in zip(batch, found, strict=True):
            texts[i] = text
    for text, (_, number, _) in zip(texts, wanted, strict=True):
        if args.prompts is not None:
            text = answered(records[number], text, chat=args.chat)
        show_text(f"{'' if is_single else text}\n")
    print(speed.line(), file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
