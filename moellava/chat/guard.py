"""What stands before the server's application: key, host name, queue bound, size of the body.

All that can be refused without reading the body is refused before it is read.
"""

import asyncio
import hmac
from collections.abc import Collection

from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moellava.chat.messages import Limits

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ERRORS = {
    400: "What was asked for cannot be answered.",
    401: "The API key is wrong.",
    404: "There is no such model.",
    408: "The body took too long.",
    413: "The body is too large.",
    422: "A field is wrong.",
    429: "Too many requests are waiting.",
    500: "The answer could not be computed.",
    503: "The server is stopping or out of memory.",
}
_KINDS = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error"}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """An error in OpenAI's form."""

    error: ErrorDetail


def error_response(status: int, message: str, code: str | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    message = message.encode(errors="replace").decode()  # half a surrogate pair cannot be sent
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": None, "code": code}
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse({"error": error}, status, headers=headers)


class Guard:
    """ASGI middleware; `hosts` are the names that a request may call this server by, if bounded.

    A bound on names keeps web pages out that point a name of their own to this machine.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, api_key: str | None, hosts: Collection[str] | None
    ) -> None:
        self._app = app
        self._limits = limits
        self._api_key = api_key
        self._hosts = hosts
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(Headers(scope=scope), scope)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        self._num_open += 1
        try:
            await self._with_body(scope, receive, send)
        finally:
            self._num_open -= 1

    def _refusal(self, headers: Headers, scope: Scope) -> JSONResponse | None:
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if self._hosts is not None and host.strip("[]") not in self._hosts:
            return error_response(
                400, "This server answers to localhost only.", code="unknown_host"
            )
        given = headers.get("authorization", "").removeprefix("Bearer ")
        is_open = scope["path"] == "/health"
        is_key = hmac.compare_digest(given.encode(), (self._api_key or "").encode())
        if self._api_key is not None and not is_key and not is_open:
            message = "Wrong API key. Send it as 'Authorization: Bearer KEY'."
            return error_response(401, message, code="invalid_api_key")
        if scope["method"] == "POST" and self._num_open >= self._limits.waiting:
            message = f"{self._num_open} requests are waiting, the limit. Try again later."
            return error_response(429, message, code="too_many_requests")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> JSONResponse:
        message = f"The body is larger than {self._limits.body_bytes:,} bytes, the limit."
        return error_response(413, message, code="body_too_large")

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await asyncio.wait_for(self._read(receive), self._limits.body_seconds)
        except asyncio.TimeoutError:  # two classes before Python 3.11
            seconds = self._limits.body_seconds
            refusal = error_response(408, f"The body took longer than {seconds:g} seconds.")
            await refusal(scope, receive, send)
            return
        if body is None:
            await self._too_large()(scope, receive, send)
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        del body
        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or None if it is beyond the limit."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return bytes(body)
            body += message.get("body", b"")
            if len(body) > self._limits.body_bytes:
                return None
            if not message.get("more_body", False):
                return bytes(body)
