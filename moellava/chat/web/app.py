"""The page over HTTP: `create_web_app`, and `serve_web`, which runs it until it is stopped.

Of all that gradio offers, only what the page needs can be reached: no files, no proxy, no history,
no calls by name. The browser is told to fetch nothing from anywhere else.
"""

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moellava.chat.guard import LOOPBACK
from moellava.chat.server import listening
from moellava.chat.web.page import build_page
from moellava.chat.web.session import Sessions, WebLimits
from moellava.model.conversation import require_chat_template
from moellava.model.loaded_model import LoadedModel

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


def create_web_app(
    loaded: LoadedModel,
    folder: Path,
    *,
    name: str,
    system: str | None = None,
    max_new_tokens: int = 256,
    limits: WebLimits | None = None,
    local_only: bool = True,
) -> FastAPI:
    """The page's application, for any ASGI server; one in a process.

    Args:
        folder: for uploads. gradio takes it from GRADIO_TEMP_DIR, which is set to a part of it.
        name: what the model is called on the page.
        system: the system prompt of every conversation, if any.
        local_only: answer only to requests that call this server localhost.

    Raises:
        ValueError: the model has no chat template.
    """
    require_chat_template(loaded.processor)
    limits = limits or WebLimits()
    sessions = Sessions(loaded, folder, name=name, system=system, limits=limits)
    os.environ["GRADIO_TEMP_DIR"] = str(sessions.arrivals)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        sessions.close_all()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_OnlyThePage, most_bytes=limits.session_bytes)
    if local_only:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        build_page(sessions, max_new_tokens=max_new_tokens),
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=limits.file_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(),
        css_paths=Path(__file__).with_name("page.css"),
    )
    return mounted


def serve_web(
    loaded: LoadedModel,
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int = 7860,
    system: str | None = None,
    max_new_tokens: int = 256,
) -> None:
    """Show the page until the process is interrupted; uploads are deleted then.

    Raises:
        OSError: the port is in use.
    """
    with listening(host, port) as listener, tempfile.TemporaryDirectory() as folder:
        app = create_web_app(
            loaded,
            Path(folder),
            name=name,
            system=system,
            max_new_tokens=max_new_tokens,
            local_only=host in LOOPBACK,
        )
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[listener])


def _theme() -> gr.Theme:
    """Calm, and in the system's own fonts: gradio's themes bring fonts of their own."""
    return gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


class _OnlyThePage:
    """ASGI middleware: 404 for what the page does not need; bounded bodies, and headers."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app = app
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if path not in _PATHS and not path.startswith(_PATHS_BELOW):
            await PlainTextResponse("Not found.", 404)(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdigit() or int(length) > self._most_bytes:
            message = f"The upload is larger than {self._most_bytes:,} bytes, the limit."
            await PlainTextResponse(message, 413)(scope, receive, send)
            return
        num_bytes = 0

        async def receive_bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            # A body that does not say its length is cut off, as if the client had left.
            return message if num_bytes <= self._most_bytes else {"type": "http.disconnect"}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        await self._app(scope, receive_bounded, send_with_headers)
