"""What the server does with connections: bodies, clients that leave, and signals."""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Awaitable, Iterator

import uvicorn
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jlora.serving.openai_requests import RequestError

MAX_BODY_BYTES = 1 << 20


async def read_body(request: HttpRequest) -> bytes:
    """Returns the body, which has to be JSON: a form of another page cannot send that."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError("content-type: expected application/json", 415)
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise RequestError(f"the body has more than {MAX_BODY_BYTES:,} bytes", 413)
    return data


async def unless_gone(request: HttpRequest, answer: Awaitable[Response]) -> Response:
    """Returns the answer; ends its making when the client has gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    making, watching = asyncio.ensure_future(answer), asyncio.create_task(gone())
    try:
        await asyncio.wait((making, watching), return_when=asyncio.FIRST_COMPLETED)
        if not making.done():
            raise ClientDisconnect
        return making.result()
    finally:
        for task in (making, watching):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, RequestError):
            await making


class HttpServer(uvicorn.Server):
    """A server that a signal stops when the open requests are answered."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles SIGINT and SIGTERM while the body runs, and does not raise them again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        both = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in both}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
