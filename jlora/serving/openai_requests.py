"""What a request in OpenAI's format asks for, checked: its fields as our own settings."""

from dataclasses import dataclass
from typing import Any

from jlora.config.sampling_config import SamplingConfig
from jlora.errors import JloraError, UsageError, listing, nearest

MOST_SAMPLES = 8
_MOST_STOPS = 4
# Fields that change nothing here.
_IGNORED = {"user", "metadata", "store", "service_tier", "parallel_tool_calls"}
# Fields of others than these values are refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "modalities": (None, ["text"]),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "auto", "none"),
}
_COMMON = {
    *("model", "stream", "stream_options", "n", "stop", "seed", "max_tokens"),
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
}
FIELDS = {
    "chat": _COMMON | {"messages", "tools", "max_completion_tokens"},
    "text": _COMMON | {"prompt"},
}


class RequestError(JloraError):
    """A request that is answered with an error of HTTP."""

    def __init__(self, message: str, status: int = 400, param: str | None = None):
        """Makes the error of a field."""
        super().__init__(message)
        self.status, self.param = status, param


@dataclass(frozen=True)
class Wanted:
    """A checked request."""

    model: str
    prompts: list[Any]
    """Texts or lists of ids; one conversation for a chat."""
    tools: list[Any] | None
    sampling: SamplingConfig
    max_tokens: int | None
    stop: list[str]
    samples: int
    seed: int | None
    stream: bool
    with_usage: bool
    """Whether a stream ends with the number of tokens."""


def read_request(body: Any, kind: str) -> Wanted:
    """Returns what a body of JSON asks for.

    Args:
        body: parsed.
        kind: chat or text.

    Raises:
        RequestError: a field is unknown, of another type, or not supported.
    """
    if not isinstance(body, dict):
        raise RequestError("the body is not a JSON object")
    for key, value in body.items():
        if key in _NEUTRAL and value not in _NEUTRAL[key]:
            raise RequestError(f"{key}={value!r:.80} is not supported", param=key)
        if key not in FIELDS[kind] | _IGNORED | _NEUTRAL.keys():
            hint = nearest(key, FIELDS[kind])
            raise RequestError(f"unknown field {key!r:.80}{hint}", param=key)
    get = _Fields(body)
    stream = get.value("stream", bool, False)
    options = get.value("stream_options", dict, {})
    default = 1.0  # OpenAI's
    try:
        sampling = SamplingConfig(
            repetition_penalty=get.number("repetition_penalty", 1.0),
            temperature=get.number("temperature", default),
            top_k=get.integer("top_k", 0, least=0) or 0,
            top_p=get.number("top_p", 1.0),
            min_p=get.number("min_p", 0.0),
        )
    except UsageError as error:
        raise RequestError(str(error)) from error
    limits = [
        get.integer(name, None) for name in ("max_completion_tokens", "max_tokens")
    ]
    return Wanted(
        model=get.value("model", str, ...),
        prompts=_conversation(get) if kind == "chat" else _prompts(get),
        tools=get.value("tools", list, None),
        sampling=sampling,
        max_tokens=next((limit for limit in limits if limit is not None), None),
        stop=_stop(body.get("stop")),
        samples=get.integer("n", 1, most=MOST_SAMPLES) or 1,
        seed=get.integer("seed", None, least=0, most=2**32 - 1),
        stream=stream,
        with_usage=options.get("include_usage") is True,
    )


class _Fields:
    """The fields of a body; null is as good as absent."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = body

    def value(self, name: str, kind: type, default: Any) -> Any:
        found = self._body.get(name)
        if found is None and default is not ...:
            return default
        if not isinstance(found, kind):
            names = {str: "a string", bool: "true or false", dict: "an object"}
            expected = names.get(kind, "a list")
            raise RequestError(f"{name}: expected {expected}", param=name)
        return found

    def number(self, name: str, default: float) -> float:
        found = self._body.get(name)
        if found is None:
            return default
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise RequestError(f"{name}={found!r:.80}: expected a number", param=name)
        try:
            return float(found)
        except OverflowError:
            raise RequestError(f"{name}: too large a number", param=name) from None

    def integer(
        self, name: str, default: int | None, *, least: int = 1, most: int = 2**31 - 1
    ) -> int | None:
        found = self._body.get(name)
        if found is None:
            return default
        if type(found) is not int or not least <= found <= most:
            raise RequestError(
                f"{name}={found!r:.80}: expected an integer from {least} to {most}",
                param=name,
            )
        return found


def _stop(found: Any) -> list[str]:
    texts = [found] if isinstance(found, str) else found or []
    is_right = isinstance(texts, list) and all(isinstance(t, str) and t for t in texts)
    if not is_right or len(texts) > _MOST_STOPS:
        raise RequestError(
            f"stop: expected a text, or a list of at most {_MOST_STOPS}", param="stop"
        )
    return texts


def _conversation(get: _Fields) -> list[Any]:
    messages = get.value("messages", list, ...)
    wrong = [
        i
        for i, message in enumerate(messages)
        if not isinstance(message, dict) or not isinstance(message.get("role"), str)
    ]
    if wrong or not messages:
        raise RequestError(
            f"messages {listing(wrong)}: expected objects with role and content",
            param="messages",
        )
    return [[_plain_message(message) for message in messages]]


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """Returns a message whose content is text, where it came as parts of text."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = [
        part.get("text")
        for part in content
        if isinstance(part, dict) and part.get("type") == "text"
    ]
    if len(texts) != len(content) or not all(isinstance(t, str) for t in texts):
        raise RequestError("content: only parts of type text", param="messages")
    return {**message, "content": "".join(map(str, texts))}


def _prompts(get: _Fields) -> list[Any]:
    """Returns each prompt, as text or as ids."""
    found: Any = get._body.get("prompt")
    prompts = [found] if isinstance(found, str) or _are_ids(found) else found
    if (
        not isinstance(prompts, list)
        or not prompts
        or not all(isinstance(p, str) or _are_ids(p) for p in prompts)
    ):
        raise RequestError(
            "prompt: expected a text, a list of texts, or of token ids", param="prompt"
        )
    return prompts


def _are_ids(found: Any) -> bool:
    is_list = isinstance(found, list) and bool(found)
    return is_list and all(type(token) is int and token >= 0 for token in found)
