"""The model's tokenizer: text and conversations to token ids, as its own files say."""

import re
from collections.abc import Mapping, Sequence, Set
from functools import cached_property, partial
from typing import Any

import numpy as np
import tokenizers

from jlora.config.llama_config import LlamaConfig
from jlora.data.chat.chat_template import ChatTemplate
from jlora.data.chat.control_tokens import (
    Encoded,
    Rendered,
    add_guard,
    check_text,
    control_pattern,
    encode_data_as_text,
    encode_guarded,
)
from jlora.data.tokenize.added_tokens import add_missing_tokens
from jlora.data.tokenize.tokenizer_settings import (
    eos_ids,
    find_additional_tokens,
    find_special_tokens,
    find_templates,
    read_settings,
    tokenizer_fingerprint,
)
from jlora.data.tokenize.tokenizer_trial import check_tokenizer
from jlora.errors import CorruptError, UnsupportedError, UsageError, listing

# `tokenizers` needs 100 times the size of a text in memory. A whole chunk at once would
# be a tenth slower, because so much memory goes back to the system after each call.
_TEXTS_AT_ONCE = 128


class Tokenizer:
    """A fast tokenizer with its special tokens and chat templates."""

    def __init__(
        self,
        files: Mapping[str, bytes],
        config: LlamaConfig,
        *,
        was_tried: bool = False,
    ) -> None:
        """Makes the tokenizer that the files of a model folder describe.

        Args:
            files: {name: bytes}.
            config: of the model.
            was_tried: whether another process has tried these files out.

        Raises:
            UnsupportedError: no tokenizer.json.
            CorruptError: a file that cannot be read.
        """
        self._origin = dict(files), config
        if not was_tried and "tokenizer.json" in files:
            check_tokenizer(files["tokenizer.json"])
        self._backend = backend = _load_backend(files)
        settings = read_settings(files, "tokenizer_config.json")
        generation = read_settings(files, "generation_config.json")
        special_map = read_settings(files, "special_tokens_map.json")
        # As in Transformers, where added_tokens_decoder makes the older file obsolete.
        sources = [special_map, settings]
        if "added_tokens_decoder" in settings:
            sources.reverse()
        special = find_special_tokens(sources, backend, config)
        has_pad = backend.token_to_id(special.get("pad_token", "")) is not None
        add_missing_tokens(
            backend,
            settings,
            read_settings(files, "added_tokens.json"),
            special,
            find_additional_tokens(settings, special_map),
        )
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        added_tokens = {token.content: token.special for token in added.values()}
        self.bos_id = self._special_id(special, "bos_token")
        self.eos_id = self._special_id(special, "eos_token")
        self.pad_id = self._special_id(special, "pad_token")
        if self.pad_id is not None and not has_pad and self.pad_id >= config.vocab_size:
            self.pad_id = None  # new, without an embedding, and of no use in training
        self.stop_ids = frozenset(config.eos_token_id).union(
            eos_ids(generation.get("eos_token_id")), eos_ids(self.eos_id)
        )
        """Ids that end a generated text."""
        stop_tokens = {
            added[index].content for index in self.stop_ids if index in added
        }
        self._templates = {
            name: ChatTemplate(
                text,
                special_tokens=special,
                added_tokens=added_tokens,
                stop_tokens=stop_tokens,
                name=f"chat template of {file}",
            )
            for name, (file, text) in find_templates(files, settings).items()
        }
        self.fingerprint = tokenizer_fingerprint(files)
        adds_bos = settings.get("add_bos_token")
        if not isinstance(adds_bos, bool):
            adds_bos = backend.encode("a").ids[:1] == [self.bos_id]
        self.adds_bos = adds_bos and self.bos_id is not None
        """Whether plain text begins with BOS."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the files, from which another process makes the same tokenizer."""
        return partial(Tokenizer, was_tried=True), self._origin

    def encode(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Returns the ids of plain text; control strings in it become control tokens.

        With `add_bos` the ids begin with exactly one BOS, if the model wants one.
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
        """Returns the ids of a text that continues another one."""
        check_text(text)
        return encode_guarded(self._guarded, text).ids

    def with_bos(self, ids: list[int]) -> list[int]:
        """Returns the ids with one BOS in front if the model wants one."""
        if self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def begins_with_two_bos(self, ids: list[int]) -> bool:
        """Returns whether BOS was written twice, which no model was trained with."""
        return self.bos_id is not None and ids[:2] == [self.bos_id] * 2

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Returns the text, without special tokens or with them as they are written."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

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

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> list[int]:
        """Returns the ids of a conversation, in which no message can forge a turn."""
        template = self.template(tools)
        rendered = template.render(
            template.prepare(messages, tools),
            add_generation_prompt=add_generation_prompt,
        )
        return self.encode_rendered([rendered])[0].ids

    def encode_rendered(
        self, conversations: Sequence[Rendered], *, with_offsets: bool = False
    ) -> list[Encoded]:
        """Returns the ids of rendered conversations, and offsets if asked for."""
        texts = [rendered.text for rendered in conversations]
        if not with_offsets and not any(c.boundaries for c in conversations):
            return [Encoded(ids, []) for ids in self.encode_many(texts)]
        batch = self._backend.encode_batch(texts, add_special_tokens=False)
        result = []
        for rendered, encoding in zip(conversations, batch, strict=True):
            encoded = Encoded(encoding.ids, encoding.offsets)
            if rendered.boundaries:
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
        """Ids of the tokens that stay text where a user writes them."""
        return self._ids(*(t.controls for t in self._templates.values()))

    @cached_property
    def turn_ids(self) -> frozenset[int]:
        """Ids of the tokens that begin or end a turn, which only a template may write."""
        return self._ids(*(t.turn_markers for t in self._templates.values()))

    def is_added(self, index: int) -> bool:
        """Returns whether a token is taken from a text as a whole, before any merging."""
        return index in self._added_ids

    def _ids(self, *texts: Set[str]) -> frozenset[int]:
        ids = (self._backend.token_to_id(text) for text in set().union(*texts))
        return frozenset(index for index in ids if index is not None)

    @cached_property
    def is_control(self) -> np.ndarray:
        """Bool [n]: whether each id is in `control_ids`; n is one more than the last."""
        result = np.zeros(max(self.control_ids, default=-1) + 2, bool)
        result[list(self.control_ids)] = True
        return result

    @cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """A pattern that finds the control tokens in a text."""
        return control_pattern({self.token(index) for index in self.control_ids})

    @cached_property
    def _guarded(self) -> tokenizers.Tokenizer:
        return add_guard(self._backend, added_tokens=True)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        return add_guard(self._backend, added_tokens=False)

    def _special_id(self, special_tokens: Mapping[str, str], name: str) -> int | None:
        text = special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)


def _load_backend(files: Mapping[str, bytes]) -> tokenizers.Tokenizer:
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
    # Saved truncation and padding would silently apply to every text.
    backend.no_truncation()
    backend.no_padding()
    return backend
