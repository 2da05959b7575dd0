"""What stands before gradio: of all that it offers, only what the page needs can be reached.

No files, no proxy, no history, no calls by name; and a call may name no file but an upload, which
gradio itself checks for its own server, but not when it is mounted in another application.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_API = "/gradio_api"
_PATHS = ("/", "/config", "/theme.css", "/favicon.ico", f"{_API}/startup-events")
_PATHS_BELOW = (
    *("/assets/", "/static/", f"{_API}/heartbeat/", f"{_API}/queue/"),
    *(f"{_API}/upload", f"{_API}/info", f"{_API}/cancel"),
)
_HEADERS = {
    # Pictures stand in the page as data; an answer that names an address fetches nothing.
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
        "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
        "worker-src 'self' blob:; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_CALL = f"{_API}/queue/join"
_CALL_BYTES = 2**20  # of a call; what it uploads comes before it


class PageGuard:
    """ASGI middleware: 404 for what the page does not need, bounded bodies, and headers.

    Args:
        uploads: the folder of the files that a call may name.
        most_bytes: of one body.
    """

    def __init__(self, app: ASGIApp, uploads: Path, most_bytes: int) -> None:
        self._app = app
        self._uploads = uploads.resolve()
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        most_bytes = _CALL_BYTES if path == _CALL else self._most_bytes
        length = Headers(scope=scope).get("content-length", "0")
        refusal = None
        if path not in _PATHS and not path.startswith(_PATHS_BELOW):
            refusal = PlainTextResponse("Not found.", 404)
        elif not length.isdigit() or int(length) > most_bytes:
            refusal = PlainTextResponse(f"More than {most_bytes:,} bytes, the limit.", 413)
        elif path == _CALL:
            body = await _read(receive, most_bytes)
            if body is None or not self._names_only_uploads(body):
                refusal = PlainTextResponse("The call names a file that was not uploaded.", 403)
            else:
                receive = _replay(body, receive)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self._app(scope, _bounded(receive, most_bytes), _with_headers(send))

    def _names_only_uploads(self, body: bytes) -> bool:
        try:
            named = list(_paths(json.loads(body)))
        except (ValueError, RecursionError):
            return False
        # An address is no path inside the folder either: gradio would fetch it.
        return all(
            isinstance(path, str) and Path(path).resolve().is_relative_to(self._uploads)
            for path in named
        )


def _paths(value: object) -> Iterator[object]:
    """All that a call gives as the path of a file."""
    if isinstance(value, dict):
        if "path" in value:
            yield value["path"]
        for item in value.values():
            yield from _paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item)


async def _read(receive: Receive, most_bytes: int) -> bytes | None:
    """The body; None if it is too long."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > most_bytes:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


def _bounded(receive: Receive, most_bytes: int) -> Receive:
    """A body that does not say its length is cut off, as if the client had left."""
    num_bytes = 0

    async def bounded() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        return message if num_bytes <= most_bytes else {"type": "http.disconnect"}

    return bounded


def _with_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
        await send(message)

    return with_headers
