"""The judge against a small server of this test's."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from moellava.eval.judge import Judge, describe, judge_answers
from moellava.eval.predictions import Prediction
from moellava.eval.results import write_results


def prediction(row_id, answer, answer_type="open"):
    return Prediction(
        id=row_id, question="Which organ?", answer=answer, truth="lung", answer_type=answer_type,
        answer_type_from="data",
    )  # fmt: skip


ANSWERS = [prediction("1", "the lung"), prediction("2", "heart"), prediction("3", "yes", "closed")]


@pytest.fixture
def server():
    """Says yes if the answer to judge has "lung" in it; `failures` come first, as status codes."""
    asked, failures = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, dict(self.headers), body))
            if failures:
                self.send_error(failures.pop(0))
                return
            judged = body["messages"][0]["content"].split("Answer to judge:")[1]
            said = "Yes." if "lung" in judged else "No" if "heart" in judged else "perhaps"
            reply = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args):
            pass

    running = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    running.asked, running.failures = asked, failures
    running.judge = Judge(url=f"http://127.0.0.1:{running.server_port}/v1", model="m", wait=0.01)
    yield running
    running.shutdown()


def verdicts(server, path, rows=ANSWERS):
    return {one.id: one.is_right for one in judge_answers(rows, server.judge, path)}


def test_open_answers_are_judged_and_others_are_not(server, tmp_path):
    rows = [*ANSWERS, prediction("4", "kidney")]
    assert verdicts(server, tmp_path / "j.jsonl", rows) == {"1": True, "2": False, "4": None}
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions"
    assert body["temperature"] == 0
    assert "Authorization" not in headers
    assert isinstance(body["messages"][0]["content"], str)  # text alone, no image


def test_nothing_is_asked_twice_even_after_a_kill(server, tmp_path):
    path = tmp_path / "j.jsonl"
    first = verdicts(server, path)
    with path.open("a") as file:
        file.write('{"key": "half')
    assert verdicts(server, path) == first
    assert len(server.asked) == 2
    verdicts(server, path, [prediction("5", "heart and lung")])
    assert len(server.asked) == 3


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.failures += [503, 429]
    assert verdicts(server, tmp_path / "j.jsonl") == {"1": True, "2": False}
    assert len(server.asked) == 4


def test_a_refusal_is_said_at_once(server, tmp_path):
    server.failures.append(401)
    with pytest.raises(ConnectionError, match=r"judge m at http.*did not answer.*401"):
        verdicts(server, tmp_path / "j.jsonl")
    assert len(server.asked) == 1


def test_the_key_comes_from_the_environment_and_is_not_told(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELLAVA_JUDGE_KEY", "secret")
    verdicts(server, tmp_path / "j.jsonl")
    assert server.asked[0][1]["Authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(describe(server.judge))
    assert describe(server.judge)["prompt"].startswith("Question about")


def test_verdicts_become_a_score_with_interval(server, tmp_path):
    rows = [*ANSWERS, prediction("4", "kidney"), prediction("5", "a lung")]
    found = write_results(tmp_path, rows, num_resamples=20, judge=server.judge)["judge"]
    assert found["metrics"]["open_accuracy"]["value"] == 0.5
    assert found["metrics"]["open_accuracy"]["n"] == 4
    assert found["unread"] == ["4"]
    assert (found["model"], found["temperature"]) == ("m", 0)
    assert "judge" not in write_results(tmp_path, rows, num_resamples=20)
