"""The page over HTTP: `create_web_app`, and `serve_web`, which runs it until it is stopped."""

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from moellava.chat.guard import LOOPBACK
from moellava.chat.server import listening
from moellava.chat.web.page import build_page
from moellava.chat.web.page_guard import PageGuard
from moellava.chat.web.session import Sessions, WebLimits
from moellava.model.loaded_model import LoadedModel
from moellava.model.prompts import require_chat_template


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
    app.add_middleware(PageGuard, uploads=sessions.arrivals, most_bytes=limits.session_bytes)
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
