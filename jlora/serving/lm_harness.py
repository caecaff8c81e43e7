"""jlora as a model of lm-evaluation-harness, and the harness's command with that model.

    python -m jlora.serving.lm_harness --model jlora \
        --model_args pretrained=base,adapter=run --tasks arc_easy

The harness finds a model by name when its class has been imported: this module does both.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn, get_args

from jlora.cli.unread_output import say_error
from jlora.config.run_config import ModelConfig
from jlora.config.sampling_config import TextConfig
from jlora.errors import JloraError, UsageError, listing
from jlora.loading import load_for_text
from jlora.serving.completions import complete
from jlora.serving.prompt_files import batches
from jlora.serving.scoring import score


def _end(error: JloraError) -> NoReturn:
    say_error(str(error), error.label)
    sys.exit(error.exit_status)


try:
    _api: Any = import_module("lm_eval.api.model")
except ImportError as error:
    missing = UsageError(
        "lm-evaluation-harness is not installed: pip install 'jlora[harness]'"
    )
    if __name__ == "__main__":
        _end(missing)
    raise missing from error
_windows: Any = import_module("lm_eval.utils")
# The harness registers its own models only if no other is registered yet.
import_module("lm_eval.models")
_registry: Any = import_module("lm_eval.api.registry")
Request = tuple[Any, list[int], list[int]]
# Settings of a task's generation that have the same meaning here.
_SAME = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class JloraLM(_api.TemplateLM):
    """A model with or without an adapter. Texts are tokenised as by the harness's `hf`."""

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        step: int | None = None,
        dtype: Any = "auto",
        base_dtype: Any = "keep",
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **others: Any,
    ) -> None:
        """Loads the model.

        Args:
            pretrained: what --model of `jlora generate` takes.
            adapter: what --adapter takes, or None.
            step: of a run's checkpoint, or None.
            dtype: of the computation.
            base_dtype: of the weights.
            batch_size: rows at a time; auto: 8.
            max_length: tokens that the model sees at most; None: as many as it takes.
            max_gen_toks: tokens of an answer, where the task does not say.
            others: of the harness; `device` and `max_batch_size` are not used.

        Raises:
            UsageError: an unknown argument or dtype, or as `load_for_text`.
            UnsupportedError, CorruptError: as `load_for_text`.
        """
        super().__init__()
        unknown = sorted(others.keys() - {"device", "max_batch_size"})
        if unknown:
            raise UsageError(f"model_args: {listing(unknown)} is not known to jlora")
        for name, value in (("dtype", dtype), ("base_dtype", base_dtype)):
            known = get_args(ModelConfig.__annotations__[name])
            if value not in known:
                raise UsageError(
                    f"model_args: {name}={value}; expected one of {listing(known)}"
                )
        self._path = pretrained if adapter is None else f"{pretrained} with {adapter}"
        self._loaded = load_for_text(
            ModelConfig(str(pretrained), adapter, step, dtype, base_dtype)
        )
        self._batch_size = 8 if batch_size in (None, "auto") else int(batch_size)
        longest = self._loaded.model.config.longest
        self.max_length = min(max_length or longest, longest)
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        tokenizer = self._loaded.tokenizer
        found = tokenizer.eos_id
        return min(tokenizer.stop_ids) if found is None else found

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is predicted from: BOS, or else the end of a text."""
        bos = self._loaded.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Of the harness's caches."""
        return self._path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the text of a conversation in the model's template."""
        template = self._loaded.tokenizer.template()
        prepared = template.prepare(chat_history, None)
        return template.render(
            prepared, add_generation_prompt=add_generation_prompt
        ).text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns the ids of a text, with one BOS if the model wants one."""
        return self._loaded.tokenizer.encode(
            string, add_bos=add_special_tokens is not False
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns (log-likelihood, whether it is greedy) of each continuation."""
        pairs = []
        for _name, before, after in requests:
            cut = max(0, len(before) + len(after) - self.max_length - 1)
            pairs.append((before[cut:], after))
        found = score(self._loaded, pairs, batch_size=self._batch_size)
        return [(each.log_likelihood, each.is_greedy) for each in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-likelihood of each whole text, in windows of `max_length`."""
        windows: list[Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            pieces = _windows.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for piece in map(_windows.make_disjoint_window, pieces):
                windows.append((None, *piece))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, found in zip(
            owners, self._loglikelihood_tokens(windows), strict=True
        ):
            totals[index] += found[0]
        return totals

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """Returns what the model writes after each text, until a stop string or its end."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for members in groups.values():
            settings = text_config(requests[members[0]].args[1], self.max_gen_toks)
            room = self.max_length - (settings.max_new_tokens or 0)
            if room < 1:
                raise UsageError(
                    f"max_gen_toks={settings.max_new_tokens} leaves no room for a prompt in "
                    f"the {self.max_length} tokens of the model"
                )
            ids = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
            for chosen in batches([len(each) for each in ids], self._batch_size):
                prompts = [(ids[i], members[i], 0) for i in chosen]
                found = complete(self._loaded, prompts, settings)
                for i, text in zip(chosen, found, strict=True):
                    texts[members[i]] = text
        return texts


def text_config(given: Mapping[str, Any], max_gen_toks: int) -> TextConfig:
    """Returns how the text of a task's request is generated.

    Raises:
        UsageError: a setting that jlora does not have.
    """
    rest = dict(given)
    until = rest.pop("until", None) or []
    count = rest.pop("max_gen_toks", rest.pop("max_new_tokens", max_gen_toks))
    draws = rest.pop("do_sample", None)
    settings = {name: rest.pop(name) for name in _SAME if name in rest}
    if draws is False:
        settings["temperature"] = 0.0
    elif draws:
        settings.setdefault("temperature", 1.0)
    if rest:
        raise UsageError(f"generation_kwargs: {listing(sorted(rest))} is not known")
    stops = [until] if isinstance(until, str) else list(until)
    return TextConfig(max_new_tokens=int(count), stop_strings=stops, **settings)


_registry.register_model("jlora")(JloraLM)

if __name__ == "__main__":
    try:
        import_module("lm_eval.__main__").cli_evaluate()
    except JloraError as error:
        _end(error)
