"""A server in this process, and what its clients send."""

import base64
import threading
import time
from contextlib import contextmanager

import uvicorn
from huggingface_hub.utils import httpx  # the client that openai uses too

from moellava.chat.server import create_app, listening


def running(loaded, name="toy", **options):
    """The address of a server with these options."""
    return app_running(create_app(loaded, name=name, **options))


@contextmanager
def app_running(app, log_level="warning"):
    """The address of any app, over a real socket."""
    server = uvicorn.Server(uvicorn.Config(app, log_level=log_level))
    listener = listening("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def data_uri(data: bytes, kind="image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def question(text, *urls, **view):
    images = [{"type": "image_url", "image_url": {"url": url}, **view} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def ask(client, *messages, **options):
    options = {"max_tokens": 6, **options}
    return client.chat.completions.create(model="toy", messages=list(messages), **options)


def post(address, **body):
    body = {"model": "toy", "messages": [question("Hello?")], "max_tokens": 4, **body}
    return httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
