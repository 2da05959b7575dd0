"""What is wrong with a request is said in OpenAI's form."""

import gzip
import io

import openai
import pytest
from huggingface_hub.utils import httpx  # the client that openai uses too
from PIL import Image

from moellava.chat.messages import Limits
from tests.chat.serving import ask, data_uri, post, question, running


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
