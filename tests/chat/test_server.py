"""The server over real sockets, asked by OpenAI's own client and by hostile ones."""

import base64
import gzip
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import torch
import uvicorn
from huggingface_hub.utils import httpx  # the client that openai uses too
from PIL import Image
from pydicom.data import get_testdata_file

from moellava.chat.messages import Limits
from moellava.chat.server import create_app, listening
from moellava.cli import app as cli
from moellava.model.conversation import Conversation

CT = get_testdata_file("CT_small.dcm", download=False)


@contextmanager
def running(loaded, name="toy", **options):
    """The address of a server with these options."""
    app = create_app(loaded, name=name, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    listener = listening("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    while not server.started:
        time.sleep(0.01)
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def address(loaded):
    with running(loaded) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as found:
        yield found


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


@pytest.fixture(scope="module")
def png(scan):
    with open(scan, "rb") as file:
        return data_uri(file.read())


class TestAnswers:
    def test_an_answer_is_that_of_the_model(self, client, loaded, png, scan):
        reply = ask(client, question("What is this?", png))
        expected = Conversation(loaded).ask("What is this?", scan, max_new_tokens=6)
        assert reply.choices[0].message.content == expected
        assert reply.choices[0].finish_reason == "length"

    def test_usage_counts_tokens_with_those_of_images(self, client, loaded, png, scan):
        usage = ask(client, question("What is this?", png)).usage
        conversation = Conversation(loaded)
        item = {"type": "image", "image": scan}
        content = [item, {"type": "text", "text": "What is this?"}]
        conversation.add({"role": "user", "content": content})
        assert usage.prompt_tokens == conversation.num_tokens > 196
        assert usage.completion_tokens == 6
        assert usage.total_tokens == usage.prompt_tokens + 6

    def test_streamed_is_whole(self, client, png):
        messages = [
            {"role": "system", "content": "Be brief."},
            question("What is this?", png),
            {"role": "assistant", "content": "A slide."},
            question("Which stain?"),
        ]
        whole = ask(client, *messages, max_tokens=20)
        chunks = list(
            ask(
                client,
                *messages,
                max_tokens=20,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
        assert "".join(pieces) == whole.choices[0].message.content
        assert len([piece for piece in pieces if piece]) > 5
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        assert chunks[-1].usage == whole.usage

    def test_the_stream_ends_with_done(self, address):
        response = post(address, stream=True)
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.text.endswith("data: [DONE]\n\n")

    def test_dicom_is_seen_through_a_window(self, client, loaded):
        with open(CT, "rb") as file:
            url = data_uri(file.read(), "application/dicom")
        reply = ask(client, question("What?", url, window="lung"))
        image = {"image": CT, "window": "lung"}
        expected = Conversation(loaded).ask("What?", image, max_new_tokens=6)
        assert reply.choices[0].message.content == expected

    def test_logprobs_are_those_of_the_logits(self, client, loaded):
        reply = ask(client, question("Hello?"), logprobs=True, top_logprobs=3, max_tokens=5)
        content = reply.choices[0].logprobs.content
        prompt = loaded.processor.apply_chat_template(
            [question("Hello?")], add_generation_prompt=True, tokenize=False
        )
        ids = loaded.processor(text=[prompt], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = loaded.model(input_ids=ids).logits[0, -1].log_softmax(-1).topk(3)
        first = content[0]
        assert len(content) == 5
        assert first.logprob == pytest.approx(expected.values[0].item(), abs=1e-4)
        assert [top.logprob for top in first.top_logprobs] == pytest.approx(
            expected.values.tolist(), abs=1e-4
        )
        assert first.token == loaded.tokenizer.convert_ids_to_tokens(expected.indices[0].item())

    def test_a_stop_string(self, client):
        text = ask(client, question("Hello?"), max_tokens=12).choices[0].message.content
        stop = text[10:14]
        reply = ask(client, question("Hello?"), max_tokens=12, stop=[stop])
        assert reply.choices[0].message.content == text[: text.index(stop)].strip()
        assert reply.choices[0].finish_reason == "stop"

    def test_a_seed_repeats_a_sample_in_any_company(self, client):
        def sample(_=None):
            reply = ask(client, question("Hello?"), temperature=1.0, seed=7, max_tokens=8)
            return reply.choices[0].message.content

        first = sample()
        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(sample, range(4))) == {first}

    def test_models_and_health(self, client, address):
        assert [model.id for model in client.models.list()] == ["toy"]
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}

    def test_the_model_needs_no_network(self, loaded, no_network):
        from fastapi.testclient import TestClient

        with TestClient(create_app(loaded, name="toy", local_only=False)) as local:
            body = {"model": "toy", "messages": [question("Hello?")], "max_tokens": 2}
            assert local.post("/v1/chat/completions", json=body).status_code == 200


class TestManyAtOnce:
    def test_waiting_requests_are_one_batch_with_the_same_answers(self, loaded, png, monkeypatch):
        sizes = []
        generate = loaded.model.generate
        monkeypatch.setattr(
            loaded.model,
            "generate",
            lambda **inputs: sizes.append(len(inputs["input_ids"])) or generate(**inputs),
        )
        asked = [question(f"Question {n}?", *[png] * (n % 2)) for n in range(12)]
        with running(loaded) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")

            def text(message):
                return ask(client, message).choices[0].message.content

            with ThreadPoolExecutor(12) as pool:
                together = list(pool.map(text, asked))
            assert max(sizes) > 1
            sizes.clear()
            assert [text(message) for message in asked] == together
            assert set(sizes) == {1}

    def test_200_requests_are_answered_or_told_to_come_again(self, loaded):
        with running(loaded, limits=Limits(waiting=32)) as address:
            limits = httpx.Limits(max_connections=None)
            with httpx.Client(limits=limits, timeout=120) as http, ThreadPoolExecutor(200) as pool:
                body = {"model": "toy", "messages": [question("Hello?")], "max_tokens": 2}
                url = f"{address}/v1/chat/completions"
                replies = list(pool.map(lambda _: http.post(url, json=body), range(200)))
            codes = [reply.status_code for reply in replies]
            texts = {
                reply.json()["choices"][0]["message"]["content"]
                for reply in replies
                if reply.status_code == 200
            }
            assert set(codes) <= {200, 429}
            assert codes.count(200) >= 32
            assert len(texts) == 1
            assert post(address).status_code == 200

    def test_a_client_that_leaves_frees_the_model(self, loaded):
        with running(loaded, limits=Limits(new_tokens=1500)) as address:
            body = {"model": "toy", "messages": [question("Hello?")], "max_tokens": 1500}
            url = f"{address}/v1/chat/completions"
            streamed = {**body, "stream": True}
            with httpx.stream("POST", url, json=streamed, timeout=60) as response:
                next(response.iter_lines())
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, timeout=0.5)
            start = time.perf_counter()
            assert post(address).status_code == 200
            seconds = time.perf_counter() - start
            start = time.perf_counter()
            assert post(address, max_tokens=1500).status_code == 200
            assert seconds < (time.perf_counter() - start) / 2


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "status", "message"),
        [
            ({"model": "gpt"}, 404, "There is no model 'gpt'"),
            ({"messages": []}, 422, "messages: List should have at least 1 item"),
            ({"temperature": 3}, 422, "temperature: "),
            ({"temperature": "warm"}, 422, "temperature: "),
            ({"tools": []}, 422, "tools: Extra inputs are not permitted"),
            ({"n": 2}, 422, "n: "),
            ({"max_tokens": 5000}, 400, "max_tokens is 5000; this server answers with at most 512"),
            ({"messages": [question(" ")]}, 400, "The question is empty"),
            ({"messages": [{"role": "user", "content": "<image>"}]}, 400, "Leave <image> out"),
            ({"messages": [question("a " * 3000)]}, 400, "the context holds 2048"),
            ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "not the user's"),
        ],
    )
    def test_what_is_wrong_is_said_in_openais_form(self, address, change, status, message):
        response = post(address, **change)
        assert response.status_code == status
        error = response.json()["error"]
        assert message in error["message"]
        assert set(error) == {"message", "type", "param", "code"}

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            ("/etc/passwd", "expected a data: URI"),
            ("file:///etc/passwd", "expected a data: URI"),
            ("http://127.0.0.1/x.png", "expected a data: URI"),
            ("data:image/png,abc", "without ;base64"),
            ("data:image/png;base64,a?", "not valid base64"),
            (data_uri(b"no image"), "cannot be read as an image"),
            (data_uri(gzip.compress(bytes(2**22))), "more than 1,048,576 bytes when unpacked"),
            (data_uri(b"1.2.840.10008.1.2.1.99"), "deflated DICOM"),
        ],
    )
    def test_an_image_of_another_kind(self, loaded, url, message):
        with running(loaded, limits=Limits(unpacked_bytes=2**20)) as address:
            response = post(address, messages=[question("What?", url)])
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ((10_000, 8_000), "10000x8000 pixels, beyond the limit of 64,000,000"),
            ((30_000, 10_000), "larger than Pillow's limit: Image size (300000000 pixels)"),
        ],
    )
    def test_a_picture_beyond_the_limit_is_not_decoded(self, address, size, message):
        file = io.BytesIO()
        Image.new("1", size).save(file, "PNG")
        response = post(address, messages=[question("What?", data_uri(file.getvalue()))])
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]

    def test_too_many_images(self, address, png):
        response = post(address, messages=[question("What?", *[png] * 17)])
        assert "17 images; the limit is 16" in response.json()["error"]["message"]
        response = post(address, messages=[question("What?", *[png] * 12)])
        assert "(2352 of images" in response.json()["error"]["message"]

    def test_the_client_raises_its_own_errors(self, client):
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="x", messages=[question("Hi")])
        with pytest.raises(openai.UnprocessableEntityError):
            ask(client, question("Hi"), n=2)
        with pytest.raises(openai.BadRequestError):
            ask(client, question(" "))

    def test_an_api_key(self, loaded):
        with running(loaded, api_key="secret") as address:
            assert post(address).status_code == 401
            with pytest.raises(openai.AuthenticationError):
                ask(openai.OpenAI(base_url=f"{address}/v1", api_key="wrong"), question("Hi"))
            assert ask(openai.OpenAI(base_url=f"{address}/v1", api_key="secret"), question("Hi"))
            assert httpx.get(f"{address}/health").status_code == 200
            assert httpx.get(f"{address}/v1/models").status_code == 401

    def test_a_failure_is_not_told_in_detail(self, loaded, monkeypatch):
        with running(loaded) as address:
            monkeypatch.setattr(loaded.model, "forward", lambda **_: 1 / 0)
            response = post(address)
            streamed = post(address, stream=True).text
            monkeypatch.undo()
            assert response.status_code == 500
            assert "division" not in response.text + streamed
            assert '"error"' in streamed
            assert post(address).status_code == 200

    def test_unknown_addresses_and_methods(self, address):
        for method, path, status in (("GET", "/x", 404), ("GET", "/v1/chat/completions", 405)):
            response = httpx.request(method, f"{address}{path}")
            assert response.status_code == status
            assert response.json()["error"]["message"]


class TestHostileBodies:
    @pytest.mark.parametrize(
        ("body", "status"),
        [
            (b"", 422),
            (b"{", 400),
            (b"\xff\xfe\x00", 400),
            (b"[" * 100_000, 400),
            (b'{"model": "toy", "messages": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
            (b'{"model": "toy", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
            (b'{"model": "toy", "\\ud800": 1, "messages": []}', 422),
            (b'{"model": "toy", "temperature": NaN, "messages": []}', 422),
            (b"null", 422),
        ],
    )
    def test_a_broken_body(self, address, body, status):
        headers = {"content-type": "application/json"}
        url = f"{address}/v1/chat/completions"
        response = httpx.post(url, content=body, headers=headers, timeout=60)
        assert response.status_code == status
        assert response.json()["error"]["message"]

    def test_a_body_of_2_gigabytes_is_refused_by_its_header(self, address):
        with socket.create_connection(address_of(address)) as connection:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            connection.sendall(f"{head}Content-Length: {2**31}\r\n\r\n".encode())
            assert b" 413 " in connection.recv(1000)

    def test_a_body_without_a_length_is_cut_off(self, loaded):
        with running(loaded, limits=Limits(body_bytes=10_000)) as address:
            url = f"{address}/v1/chat/completions"
            chunks = (b"x" * 1000 for _ in range(100))
            assert httpx.post(url, content=chunks).status_code == 413

    def test_a_client_that_sends_slowly_is_told_so(self, loaded):
        with (
            running(loaded, limits=Limits(body_seconds=0.3)) as address,
            socket.create_connection(address_of(address)) as connection,
        ):
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert b" 408 " in connection.recv(1000)

    def test_a_client_that_reads_slowly_does_not_hold_up_others(self, address):
        body = json.dumps(
            {"model": "toy", "messages": [question("Hello?")], "stream": True, "max_tokens": 100}
        ).encode()
        with socket.create_connection(address_of(address)) as connection:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            connection.recv(1)
            assert post(address).status_code == 200

    def test_a_web_page_under_another_name_is_refused(self, address):
        response = httpx.get(f"{address}/v1/models", headers={"host": "evil.example:80"})
        assert response.status_code == 400


def address_of(address: str) -> tuple[str, int]:
    host, port = address.removeprefix("http://").split(":")
    return host, int(port)


def test_a_model_without_a_chat_template_is_refused(loaded, monkeypatch):
    monkeypatch.setattr(loaded.processor, "chat_template", None)
    with pytest.raises(ValueError, match=r"no chat template.*Add chat_template\.jinja"):
        create_app(loaded, name="toy")


def test_a_port_in_use_is_said_before_the_model_is_loaded(checkpoint):
    from typer.testing import CliRunner

    with listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        result = CliRunner().invoke(cli, ["serve", checkpoint, "--port", str(port)])
    assert result.exit_code == 1
    assert f"Port {port} of 127.0.0.1 is in use. Choose another: --port {port + 1}" in result.output
