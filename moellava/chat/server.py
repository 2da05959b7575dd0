"""HTTP requests → answers: OpenAI's chat completions on FastAPI (`moellava serve`).

| name | gives |
|---|---|
| `create_app` | the application, for any ASGI server |
| `serve` | runs it with uvicorn until it is stopped |
"""

import asyncio
import errno
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from moellava.chat.engine import Engine, Job
from moellava.chat.guard import ERRORS, LOOPBACK, ErrorReply, Guard, error_response
from moellava.chat.messages import ChatRequest, Limits, read_turns
from moellava.chat.replies import Reply, event
from moellava.model.conversation import start_answer
from moellava.model.prompts import ChatModel, count_tokens, require_chat_template
from moellava.model.turns import Turn

logger = logging.getLogger(__name__)

_DECODERS = 2  # requests whose images are decoded at once: each may take hundreds of megabytes
_DONE = b"data: [DONE]\n\n"


class Pending:
    """A request in the engine; `pieces` ends with None."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self.error: BaseException | None = None
        self._loop = asyncio.get_running_loop()

    def tell(self, piece: str | None) -> None:
        """Put a piece, from the engine's thread."""
        with suppress(RuntimeError):  # the server has ended
            self._loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

    def done(self, error: BaseException | None) -> None:
        """Put the end, from the engine's thread."""
        self.error = error
        self.tell(None)


class ChatService:
    """Requests → replies, by way of one engine."""

    def __init__(self, loaded: ChatModel, name: str, limits: Limits) -> None:
        self.loaded = loaded
        self.name = name
        self.limits = limits
        self.engine = Engine(loaded, max_batch=limits.batch)
        self._decoding = asyncio.Semaphore(_DECODERS)
        self._created = int(time.time())

    def models(self) -> dict[str, object]:
        """The list of one model."""
        model = {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "moellava",
            "max_model_len": self.loaded.context_len,
        }
        return {"object": "list", "data": [model]}

    async def complete(self, body: ChatRequest, request: Request) -> Response:
        """The response to a request; errors are in OpenAI's form."""
        if body.model != self.name:
            message = f"There is no model {body.model!r}. This server has {self.name!r}."
            return error_response(404, message, code="model_not_found")
        if not self.engine.is_alive:
            return error_response(503, "The server is stopping.")
        try:
            async with self._decoding:
                job, pending = await asyncio.to_thread(self._job, body, Pending())
        except (ValueError, TypeError, ImportError) as error:
            return error_response(400, " ".join(str(error).split()))
        self.engine.submit(job)
        reply = Reply(self.loaded.tokenizer, self.name, job.answer, job.num_prompt_tokens)
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            events = self._events(job, pending, reply, with_usage=with_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        return await self._whole(job, pending, reply, request)

    def _job(self, body: ChatRequest, pending: Pending) -> tuple[Job, Pending]:
        turns = read_turns(self.loaded.processor, body.messages, self.limits)
        is_sampled = body.temperature > 0
        settings: dict[str, object] = {}
        if is_sampled:
            # transformers' own default of top_k, 50, is not OpenAI's.
            settings = {"do_sample": True, "temperature": body.temperature, "top_k": 0}
            settings["top_p"] = body.top_p
        answer, num_prompt_tokens = start_answer(
            self.loaded,
            turns,
            max_new_tokens=self._max_new_tokens(body, turns),
            stop_strings=body.stop_strings,
        )
        answer.on_piece = pending.tell if body.stream else None
        job = Job(
            turns,
            answer,
            num_prompt_tokens,
            pending.done,
            settings,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            seed=body.seed if is_sampled else None,
        )
        return job, pending

    def _max_new_tokens(self, body: ChatRequest, turns: list[Turn]) -> int:
        """What was asked for; if nothing was, as much as there is room for, up to the limit."""
        asked = body.max_completion_tokens or body.max_tokens
        if asked is None:
            room = self.loaded.context_len - count_tokens(self.loaded, turns)
            return max(1, min(self.limits.new_tokens, room))
        if asked > self.limits.new_tokens:
            raise ValueError(
                f"max_tokens is {asked}; this server answers with at most "
                f"{self.limits.new_tokens} tokens."
            )
        return asked

    async def _whole(self, job: Job, pending: Pending, reply: Reply, request: Request) -> Response:
        gone = asyncio.create_task(_disconnected(request))
        ended = asyncio.create_task(pending.pieces.get())
        try:
            await asyncio.wait({gone, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not ended.done():
                job.answer.cancel()
                ended.cancel()
            gone.cancel()
        if not ended.done() or ended.cancelled():
            return Response(status_code=499)  # nobody reads it
        if pending.error is not None:
            return _failed(pending.error)
        return JSONResponse(reply.whole())

    async def _events(
        self, job: Job, pending: Pending, reply: Reply, *, with_usage: bool
    ) -> AsyncIterator[bytes]:
        try:
            yield reply.chunk({"role": "assistant", "content": ""})
            while (piece := await pending.pieces.get()) is not None:
                yield reply.chunk({"content": piece})
            if pending.error is not None:
                yield event({"error": {"message": _reason(pending.error), "type": "server_error"}})
            else:
                yield reply.chunk({}, is_last=True)
                if with_usage:
                    yield reply.usage_chunk()
            yield _DONE
        finally:
            job.answer.cancel()  # the client may have gone


def create_app(
    loaded: ChatModel,
    *,
    name: str,
    api_key: str | None = None,
    limits: Limits | None = None,
    local_only: bool = True,
) -> FastAPI:
    """The server's application.

    Args:
        name: what the model is called in requests.
        api_key: what clients must send, if given.
        local_only: answer only to requests that call this server localhost.

    Raises:
        ValueError: the model has no chat template.
    """
    require_chat_template(loaded.processor)
    limits = limits or Limits()
    services: list[ChatService] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        services.append(ChatService(loaded, name, limits))
        yield
        await asyncio.to_thread(services.pop().engine.stop)

    app = FastAPI(title="moellava", lifespan=lifespan, docs_url=None, redoc_url=None)
    hosts = LOOPBACK if local_only else None
    app.add_middleware(Guard, limits=limits, api_key=api_key, hosts=hosts)

    @app.post(
        "/v1/chat/completions",
        responses={200: {"content": {"text/event-stream": {}}}, **_described(*ERRORS)},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await services[0].complete(body, request)

    @app.get("/v1/models", responses=_described(400, 401))
    async def models() -> dict[str, object]:
        return services[0].models()

    @app.get("/health", responses=_described(400, 503))
    async def health() -> Response:
        if services and services[0].engine.is_alive:
            return JSONResponse({"status": "ok"})
        return error_response(503, "The engine has stopped.")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        if problem["type"] == "json_invalid":
            return error_response(400, f"The body is not JSON: {problem['ctx']['error']}.")
        place = ".".join(str(part) for part in problem["loc"] if part != "body")
        return error_response(422, f"{place or 'body'}: {problem['msg']}")

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, str(error.detail))

    return app


def serve(
    loaded: ChatModel,
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    limits: Limits | None = None,
) -> None:
    """Answer requests until the process is interrupted.

    Raises:
        OSError: the port is in use.
    """
    is_local = host in LOOPBACK
    if not is_local and api_key is None:
        logger.warning("%s is open to the network and has no API key; set one.", host)
    app = create_app(loaded, name=name, api_key=api_key, limits=limits, local_only=is_local)
    config = uvicorn.Config(
        app, log_level="warning", timeout_keep_alive=10, timeout_graceful_shutdown=10
    )
    with listening(host, port) as listener:
        uvicorn.Server(config).run(sockets=[listener])


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: the port is in use; the message says what to type.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        message = f"Port {port} of {host} is in use. Choose another: --port {port + 1}"
        raise OSError(message) from error


def _described(*statuses: int) -> dict[int | str, dict[str, object]]:
    """Errors for the server's own schema, at /openapi.json."""
    return {status: {"model": ErrorReply, "description": ERRORS[status]} for status in statuses}


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def _failed(error: BaseException) -> Response:
    status = 503 if "out of memory" in str(error).lower() else 500
    return error_response(status, _reason(error))


def _reason(error: BaseException) -> str:
    if "out of memory" in str(error).lower():
        return "The server is out of memory. Send fewer images, or try again later."
    return "The answer could not be computed; the server's log says why."
