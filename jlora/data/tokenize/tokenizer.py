"""Text and conversations to token ids, exactly as the model's own files say."""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers

from jlora.config.llama_config import LlamaConfig
from jlora.data.chat.chat_template import ChatTemplate
from jlora.data.chat.control_tokens import (
    Encoded,
    GuardedTokenizer,
    Rendered,
    check_text,
    control_pattern,
    encode_data_as_text,
)
from jlora.data.tokenize import tokenizer_files as model_files
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing

# What `tokenizers` makes of a text takes 100 times its size: a tenth faster than all
# rows of a chunk at once, whose memory would be the system's each time.
_TEXTS_AT_ONCE = 128


class Tokenizer:
    """A fast tokenizer with its special tokens and chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        adds_bos: bool | None,
        templates: Mapping[str, str],
        stop_ids: frozenset[int],
        fingerprint: str,
    ) -> None:
        """Use `from_files`."""
        # Settings saved in the file would silently cut and pad every text.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self._templates = {
            name: ChatTemplate(
                source,
                special_tokens=special_tokens,
                added_tokens={token.content: token.special for token in added.values()},
            )
            for name, source in templates.items()
        }
        self.bos_id = self._special_id(special_tokens, "bos_token")
        self.eos_id = self._special_id(special_tokens, "eos_token")
        self.pad_id = self._special_id(special_tokens, "pad_token")
        self.stop_ids = stop_ids | {i for i in [self.eos_id] if i is not None}
        self.fingerprint = fingerprint
        if adds_bos is None:
            adds_bos = backend.encode("a").ids[:1] == [self.bos_id]
        self.adds_bos = adds_bos and self.bos_id is not None
        """Whether plain text begins with BOS."""
        self._origin: tuple[Mapping[str, bytes], LlamaConfig]

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], config: LlamaConfig) -> "Tokenizer":
        """Returns the tokenizer that a model folder's files describe.

        Raises:
            UnsupportedError: no tokenizer.json.
            CorruptError: a file that cannot be read.
        """
        if "tokenizer.json" not in files:
            raise UnsupportedError(
                "the model has no tokenizer.json, and jlora reads no other tokenizer; "
                "write one with transformers: AutoTokenizer.from_pretrained(MODEL)"
                ".save_pretrained(MODEL)"
            )
        try:
            backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # tokenizers raises bare Exception
            raise CorruptError(f"tokenizer.json: {error}") from error
        settings = model_files.read_json(files, "tokenizer_config.json")
        special = model_files.special_tokens(
            [settings, model_files.read_json(files, "special_tokens_map.json")],
            backend,
            config,
        )
        adds_bos = settings.get("add_bos_token")
        generation = model_files.read_json(files, "generation_config.json")
        tokenizer = cls(
            backend,
            special_tokens=special,
            adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
            templates=model_files.templates(files, settings),
            stop_ids=frozenset(config.eos_token_id)
            | model_files.eos_ids(generation.get("eos_token_id")),
            fingerprint=model_files.fingerprint(files),
        )
        tokenizer._origin = dict(files), config
        return tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        """Lets other processes make the same tokenizer."""
        return Tokenizer.from_files, self._origin

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Returns the ids of plain text; control strings in it count as tokens.

        With `add_bos` the ids begin with BOS exactly once if the model wants one
        (`adds_bos`).
        """
        ids = self.encode_many([text])[0]
        return self.with_bos(ids) if add_bos else ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, without BOS."""
        for text in texts:
            check_text(text)
        ids: list[list[int]] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            some = list(texts[start : start + _TEXTS_AT_ONCE])
            batch = self._backend.encode_batch_fast(some, add_special_tokens=False)
            ids += [encoding.ids for encoding in batch]
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Returns the ids of a text that goes on after another one."""
        check_text(text)
        return self._guarded.encode(text).ids

    def with_bos(self, ids: list[int]) -> list[int]:
        """Returns the ids with one BOS in front if the model wants one."""
        if self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def spell(self, ids: Sequence[int]) -> str:
        """Returns the text, special tokens as they are written."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token(self, index: int) -> str:
        """Returns a token as the vocabulary spells it, for messages."""
        return self._backend.id_to_token(index) or "?"

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return bool(self._templates)

    def template(self, tools: Sequence[Any] | None = None) -> ChatTemplate:
        """Returns the template for a conversation with or without tools.

        Raises:
            UsageError: the model has none.
        """
        if tools is not None and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" not in self._templates:
            named = listing(sorted(self._templates))
            raise UsageError(
                f"the model has no {'default ' if named else ''}chat template"
                f"{named and f' (only {named})'}; put one into chat_template.jinja "
                "beside the tokenizer, or use data of format text or prompt_completion"
            )
        return self._templates["default"]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Returns a conversation as text."""
        rendered = self.template(tools).render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt
        )
        return rendered.text

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
    ) -> list[int]:
        """Returns the ids of a conversation; control strings in it stay text."""
        rendered = self.template(tools).render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt
        )
        return self.encode_rendered([rendered])[0].ids

    def encode_rendered(
        self, conversations: Sequence[Rendered], *, with_offsets: bool = False
    ) -> list[Encoded]:
        """Returns the ids of rendered conversations, and offsets if asked for."""
        backend = self._backend
        texts = [rendered.text for rendered in conversations]
        if not with_offsets and not any(rendered.cuts for rendered in conversations):
            return [Encoded(ids, []) for ids in self.encode_many(texts)]
        batch = backend.encode_batch(texts, add_special_tokens=False)
        result = []
        for rendered, encoding in zip(conversations, batch, strict=True):
            encoded = Encoded(encoding.ids, encoding.offsets)
            if rendered.cuts:
                encoded = encode_data_as_text(
                    rendered,
                    encoded,
                    added_ids=self._added_ids,
                    control_ids=self.control_ids,
                    plain=self._plain,
                )
            result.append(encoded)
        return result

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids of the tokens that only a template may write."""
        texts = set().union(*(t.controls for t in self._templates.values()))
        ids = (self._backend.token_to_id(text) for text in texts)
        return frozenset(index for index in ids if index is not None)

    @cached_property
    def is_control(self) -> np.ndarray:
        """Whether each id up to one above the `control_ids` is one of them."""
        table = np.zeros(max(self.control_ids, default=-1) + 2, bool)
        table[list(self.control_ids)] = True
        return table

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """A pattern that finds the control tokens in a text."""
        texts = {self.token(index) for index in self.control_ids}
        return control_pattern(texts)

    @cached_property
    def _guarded(self) -> GuardedTokenizer:
        return GuardedTokenizer(self._backend, added_tokens=True)

    @cached_property
    def _plain(self) -> GuardedTokenizer:
        return GuardedTokenizer(self._backend, added_tokens=False)

    def _special_id(self, special_tokens: Mapping[str, str], name: str) -> int | None:
        text = special_tokens.get(name)
        if text is None:
            return None
        index = self._backend.token_to_id(text)
        if index is None:
            raise CorruptError(
                f"tokenizer_config.json: {name} is {text!r}, which tokenizer.json "
                "does not have"
            )
        return index
