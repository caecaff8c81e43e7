"""A conversation with a person at a terminal: answers as they come, and a few commands."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jlora.cli.printing import unescaped_output
from jlora.config.sampling_config import TextConfig
from jlora.errors import JloraError, UsageError, warn
from jlora.loading import TextModel
from jlora.model.decoding.token_rows import KeptCache
from jlora.serving.completions import Speed, complete
from jlora.serving.prompt_files import conversation_ids, with_system

HELP = """\
/system TEXT      begin with this system message; without TEXT: with none
/reset            forget the conversation, but not the system message
/adapter on|off   answer with the adapter, or as the base model does
/save FILE        append the conversation to a JSONL file, which jlora train reads
/help             this
Ctrl-C ends an answer, Ctrl-D the session."""


class ChatSession:
    """The conversation so far, and what each line that is typed does to it."""

    def __init__(
        self,
        load: Callable[[bool], TextModel],
        settings: TextConfig,
        system: str | None,
        *,
        has_adapter: bool,
    ) -> None:
        """Loads the model.

        Args:
            load: returns the model, with its adapter or without.
            settings: how to generate.
            system: the system message to begin with.
            has_adapter: whether there is an adapter to turn off.
        """
        self._load, self._settings, self._system = load, settings, system
        self._has_adapter = self._uses_adapter = has_adapter
        self._loaded: TextModel | None = load(has_adapter)
        self._kept = KeptCache()
        self._messages: list[dict[str, Any]] = []

    def run(self) -> None:
        """Answers the lines typed until the end of the input."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - input() edits lines with it
            print("/help lists the commands; Ctrl-D ends the session.")
        for line in _lines():
            try:
                if line.startswith("/"):
                    name, _, value = line[1:].partition(" ")
                    self._command(name, value.strip())
                elif line:
                    self._answer(line)
            except JloraError as error:
                if not sys.stdin.isatty():
                    raise
                warn(str(error))  # a person can go on with another line

    def _answer(self, question: str) -> None:
        messages = [*self._messages, {"role": "user", "content": question}]
        loaded = self._model()
        whole = with_system(messages, self._system)
        ids = conversation_ids(whole, loaded.tokenizer)
        longest = loaded.model.config.longest
        room = longest - len(ids)
        if room < 1:
            raise UsageError(
                f"the conversation has {len(ids)} tokens and the model takes {longest}; "
                "begin a new one (/reset)"
            )
        count = min(self._settings.count(len(ids), longest), room)
        speed, shown = Speed(), [""]

        def show(part: str) -> None:
            shown.append(part)
            show_text(part)

        try:
            complete(
                loaded,
                [(ids, 0, 0)],
                dataclasses.replace(self._settings, max_new_tokens=count),
                show=show,
                speed=speed,
                kept=self._kept,
            )
        except KeyboardInterrupt:
            show_text(" [ended]")
        show_text("\n")
        if text := "".join(shown):  # a question that nobody answered is forgotten
            self._messages = [*messages, {"role": "assistant", "content": text}]
        print(speed.line(), file=sys.stderr)

    def _model(self) -> TextModel:
        if self._loaded is None:  # an interrupted /adapter
            self._loaded = self._load(self._uses_adapter)
        return self._loaded

    def _command(self, name: str, value: str) -> None:
        match name, value:
            case "help", "":
                print(HELP)
            case "reset", "":
                self._messages = []
                print("The conversation is forgotten.")
            case "system", _:
                self._system = value or None
                print("The conversation begins with it." if value else "None.")
            case "adapter", "on" | "off":
                self._turn_adapter(value == "on")
            case "save", _ if value:
                self._save(Path(value))
            case _:
                print(f"Not understood: /{name} {value}".rstrip() + "\n" + HELP)

    def _turn_adapter(self, on: bool) -> None:
        if on and not self._has_adapter:
            print("There is no adapter; start with --adapter RUN.")
            return
        if on != self._uses_adapter:
            self._uses_adapter = on
            self._loaded, self._kept = None, KeptCache()  # before the other is loaded
            self._model()
        print(f"The adapter is {'on' if on else 'off'}.")

    def _save(self, path: Path) -> None:
        if not self._messages:
            print("Nothing was said yet.")
            return
        record = {"messages": with_system(self._messages, self._system)}
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            print(f"{path}: cannot be written ({error.strerror})")
            return
        print(f"Appended to {path}.")


def show_text(text: str) -> None:
    """Prints a part of an answer at once; what is not for a terminal stays as it is."""
    output = sys.stdout if sys.stdout.isatty() else unescaped_output()
    print(text, end="", flush=True, file=output)


def _lines() -> Iterator[str]:
    """Yields the lines typed; Ctrl-C empties the line."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return
        except KeyboardInterrupt:
            print("\nCtrl-D ends the session.")
