"""Answers and errors in OpenAI's form, whole or as the events of a stream."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse, Response

from jlora.serving.openai_requests import RequestError, Wanted
from jlora.serving.slots import Request


class Answer:
    """An answer in OpenAI's form, whole or in parts."""

    def __init__(
        self, kind: str, wanted: Wanted, prompt_tokens: int, texts: list[Request]
    ) -> None:
        """Begins an answer.

        Args:
            kind: chat or text.
            wanted: the request.
            prompt_tokens: of all prompts.
            texts: what is generated.
        """
        self._is_chat, self._wanted, self._texts = kind == "chat", wanted, texts
        self._prompt_tokens = prompt_tokens
        name = "chat.completion" if self._is_chat else "text_completion"
        self._chunk = f"{name}.chunk" if self._is_chat else name
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": name,
            "created": int(time.time()),
            "model": wanted.model,
        }

    def _usage(self) -> dict[str, int]:
        new = sum(text.tokens for text in self._texts)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }

    async def whole(
        self, parts: AsyncIterator[tuple[int, str, str | None]]
    ) -> Response:
        """Returns the answer when all of it is there."""
        texts, reasons = [""] * len(self._texts), [""] * len(self._texts)
        async for index, text, reason in parts:
            texts[index] += text
            reasons[index] = reason or ""
        choices = []
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
            message = {
                "message": {"role": "assistant", "content": text, "refusal": None}
            }
            own = message if self._is_chat else {"text": text}
            choices.append(
                {"index": index, **own, "finish_reason": reason, "logprobs": None}
            )
        return JSONResponse({**self._head, "choices": choices, "usage": self._usage()})

    async def lines(
        self, parts: AsyncIterator[tuple[int, str, str | None]]
    ) -> AsyncIterator[str]:
        """Yields the events of a stream."""
        if self._is_chat:
            for index in range(len(self._texts)):
                yield self._line(index, {"role": "assistant", "content": ""}, None)
        try:
            async for index, text, reason in parts:
                if text or not self._is_chat:
                    own = {"content": text} if self._is_chat else text
                    yield self._line(index, own, None if self._is_chat else reason)
                if reason and self._is_chat:
                    yield self._line(index, {}, reason)
        except RequestError as error:
            yield event_line(error_body(str(error), error.status, None))
            return
        if self._wanted.with_usage:
            head = {**self._head, "object": self._chunk}
            yield event_line({**head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _line(self, index: int, own: Any, reason: str | None) -> str:
        text = {"delta": own} if self._is_chat else {"text": own}
        choice = {"index": index, **text, "finish_reason": reason, "logprobs": None}
        return event_line({**self._head, "object": self._chunk, "choices": [choice]})


def event_line(document: dict[str, Any]) -> str:
    """Returns an event of a stream."""
    return f"data: {json.dumps(document)}\n\n"


def error_answer(message: str, status: int, param: str | None = None) -> JSONResponse:
    """Returns an error in OpenAI's form."""
    headers = {"Retry-After": "1"} if status == 429 else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = error_body(message, status, param)
    return JSONResponse(body, status_code=status, headers=headers)


def error_body(message: str, status: int, param: str | None) -> dict[str, Any]:
    """Returns the document of an error."""
    kinds = {
        401: "authentication_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    kind = kinds.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    code = "model_not_found" if status == 404 and param == "model" else None
    error = {"message": message, "type": kind, "param": param, "code": code}
    return {"error": error}
