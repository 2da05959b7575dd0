"""Bodies, clients and pages that mean no good."""

import json
import socket

import pytest
from huggingface_hub.utils import httpx  # the client that openai uses too

from moellava.chat.messages import Limits
from tests.chat.serving import post, question, running


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
