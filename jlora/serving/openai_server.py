"""The application: requests in OpenAI's format over a batch of slots: chat, completions, models.

Source: OpenAI's API reference, chat/completions, completions and models.
"""

import asyncio
import hmac
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jlora.config.strict_json import parse_json
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import JloraError
from jlora.model.decoding.text_stream import TextStream
from jlora.model.decoding.token_rows import sample_key
from jlora.serving.http_server import MAX_BODY_BYTES, read_body, unless_gone
from jlora.serving.openai_answers import Answer, error_answer
from jlora.serving.openai_requests import RequestError, Wanted, read_request
from jlora.serving.prompt_files import conversation_ids
from jlora.serving.slots import Request, Slots

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TEXT_TOKENS = 16  # OpenAI's default of max_tokens for completions of text
# (index, text, reason of the end); an exception if the batch failed.
_Events = asyncio.Queue[tuple[int, str, str | None] | BaseException]
_Handler = Callable[[HttpRequest], Awaitable[Response]]


@dataclass(frozen=True)
class Limits:
    """What a server allows."""

    context: int
    """Tokens of a text with its prompt."""
    max_new_tokens: int | None
    max_requests: int
    """Texts that are generated or wait at one time."""
    api_key: str | None
    """What a client has to send as its bearer key."""


class Api:
    """The answers to requests."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        models: dict[str, int],
        limits: Limits,
        vocab_size: int,
    ) -> None:
        """Makes an API whose `slots` are set before it is used.

        Args:
            tokenizer: of the base.
            models: name -> number of its adapter, 0 for the base, which comes first.
            limits: for all clients together.
            vocab_size: of the base.
        """
        self._vocab_size = vocab_size
        self._tokenizer, self._models, self._limits = tokenizer, models, limits
        self.slots: Slots | None = None
        self._started = int(time.time())
        self._active: dict[_Events, int] = {}
        self._rendering = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failure: BaseException | None = None
        self.stop: Callable[[], None] = lambda: None

    def app(self, host: str) -> Starlette:
        """Returns the application; on this machine only, it answers no other host's name."""
        allowed = [*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]
        return Starlette(
            routes=[
                Route("/health", lambda _: JSONResponse({"status": "ok"})),
                Route("/v1/models", self._answer(self._list_models)),
                Route("/v1/models/{name:path}", self._answer(self._one_model)),
                Route(
                    "/v1/chat/completions", self._answer(self._chat), methods=["POST"]
                ),
                Route("/v1/completions", self._answer(self._text), methods=["POST"]),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed)],
            exception_handlers={
                404: lambda request, _: error_answer(
                    f"no such path: {request.url.path}", 404
                ),
                405: lambda request, _: error_answer(f"not for {request.method}", 405),
            },
        )

    def failed(self, error: BaseException) -> None:
        """Ends all requests and the server; called by the thread of the slots."""
        self.failure = error

        def end_all() -> None:
            for events in self._active:
                events.put_nowait(error)
            self.stop()

        if self._loop is not None:
            self._loop.call_soon_threadsafe(end_all)

    def _answer(self, handler: _Handler) -> _Handler:
        """Returns the handler with the key checked and errors answered as OpenAI does."""

        async def answer(request: HttpRequest) -> Response:
            try:
                self._check_key(request)
                return await handler(request)
            except RequestError as error:
                return error_answer(str(error), error.status, error.param)
            except JloraError as error:
                return error_answer(str(error), 400)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception:
                traceback.print_exc()
                return error_answer("the server failed; its log says why", 500)

        return answer

    def _check_key(self, request: HttpRequest) -> None:
        key = self._limits.api_key
        given = request.headers.get("authorization", "").encode()
        if key is not None and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise RequestError("no or a wrong bearer key", 401)

    async def _list_models(self, _: HttpRequest) -> Response:
        models = [self._model(name) for name in self._models]
        return JSONResponse({"object": "list", "data": models})

    async def _one_model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        self._number_of(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": self._started}
        base = next(iter(self._models))
        more = {} if name == base else {"parent": base}
        return {**model, "owned_by": "jlora", **more}

    def _number_of(self, name: str) -> int:
        if name not in self._models:
            known = ", ".join(self._models)
            raise RequestError(
                f"no model {name!r:.80}; there are {known}", 404, "model"
            )
        return self._models[name]

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._generate(request, "chat")

    async def _text(self, request: HttpRequest) -> Response:
        return await self._generate(request, "text")

    async def _generate(self, request: HttpRequest, kind: str) -> Response:
        body = await read_body(request)
        wanted = read_request(parse_json(body, "the body", MAX_BODY_BYTES), kind)
        number = self._number_of(wanted.model)
        self._check_count(len(wanted.prompts) * wanted.samples)
        async with self._rendering:  # a template is rendered by one process
            ids = await asyncio.to_thread(self._ids, wanted, kind)
        events: _Events = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        texts = self._requests(wanted, kind, ids, number, events)
        self._check_count(len(texts))  # others have come meanwhile
        if self.failure is not None or self.slots is None:
            raise RequestError("the server is stopping", 503)
        self._active[events] = len(texts)
        for text in texts:
            self.slots.add(text)
        answer = Answer(kind, wanted, sum(map(len, ids)), texts)
        parts = self._parts(events, texts)
        if wanted.stream:
            lines = answer.lines(parts)
            return StreamingResponse(lines, media_type="text/event-stream")
        return await unless_gone(request, answer.whole(parts))

    def _check_count(self, count: int) -> None:
        """Raises RequestError if there is no room for so many more texts."""
        most = self._limits.max_requests
        if count > most:
            raise RequestError(
                f"prompt: {count:,} texts in one request; this server takes {most}",
                param="prompt",
            )
        if sum(self._active.values()) + count > most:
            raise RequestError("too many requests at one time; try again later", 429)

    def _ids(self, wanted: Wanted, kind: str) -> list[list[int]]:
        """Returns the ids of each prompt."""
        found = []
        for prompt in wanted.prompts:
            if kind == "chat":
                ids = conversation_ids(prompt, self._tokenizer, wanted.tools)
            elif isinstance(prompt, str):
                ids = self._tokenizer.encode(prompt, add_bos=True)
            else:
                ids = prompt
                if max(ids) >= self._vocab_size:
                    raise RequestError(
                        f"prompt: token id {max(ids)}; the model has "
                        f"{self._vocab_size} tokens",
                        param="prompt",
                    )
            found.append(ids)
        return found

    def _requests(
        self,
        wanted: Wanted,
        kind: str,
        ids: list[list[int]],
        number: int,
        events: _Events,
    ) -> list[Request]:
        """Returns what the slots are to generate: every sample of every prompt."""
        loop = asyncio.get_running_loop()
        seed = secrets.randbelow(2**32) if wanted.seed is None else wanted.seed
        found: list[Request] = []
        for i, prompt in enumerate(ids):
            count = self._count(wanted, kind, len(prompt))
            for sample in range(wanted.samples):

                def receive(
                    text: str, reason: str | None, index: int = len(found)
                ) -> None:
                    event = index, text, reason
                    loop.call_soon_threadsafe(events.put_nowait, event)

                stream = TextStream(self._tokenizer.decode, wanted.stop)
                key = sample_key(seed, i, sample)
                found.append(
                    Request(
                        prompt, count, wanted.sampling, key, number, stream, receive
                    )
                )
        return found

    def _count(self, wanted: Wanted, kind: str, length: int) -> int:
        """Returns how many tokens to generate after a prompt."""
        room = self._limits.context - length
        most = min(room, self._limits.max_new_tokens or room)
        if not length:
            raise RequestError("the prompt is empty", param="prompt")
        default = most if kind == "chat" else min(most, _TEXT_TOKENS)
        count = default if wanted.max_tokens is None else wanted.max_tokens
        if room < 1 or count > most:
            raise RequestError(
                f"the prompt has {length} tokens and max_tokens is {count}; this server "
                f"takes {self._limits.context} together"
                + (f", and at most {most} new ones" if 0 < most < room else ""),
                param="max_tokens",
            )
        return count

    async def _parts(
        self, events: _Events, texts: list[Request]
    ) -> AsyncIterator[tuple[int, str, str | None]]:
        """Yields (index, text, reason of the end) until all texts have ended."""
        try:
            left = len(texts)
            while left:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise RequestError("the server failed; its log says why", 500)
                left -= event[2] is not None
                yield event
        finally:  # also if the client is gone
            for text in texts:
                text.is_ended = True
            del self._active[events]
