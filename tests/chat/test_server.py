"""The server over real sockets, asked by OpenAI's own client and by hostile ones."""

import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from huggingface_hub.utils import httpx  # the client that openai uses too
from pydicom.data import get_testdata_file

from moellava.chat.messages import Limits
from moellava.chat.server import create_app, listening
from moellava.cli import app as cli
from moellava.model.conversation import Conversation
from tests.chat.serving import ask, data_uri, post, question, running

CT = get_testdata_file("CT_small.dcm", download=False)


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
