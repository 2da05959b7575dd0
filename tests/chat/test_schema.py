"""Requests that schemathesis writes by the server's own schema, and such as break it."""

import hypothesis
import pytest

from moellava.chat.messages import Limits

from .test_server import running

schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def api(loaded):
    with running(loaded, limits=Limits(new_tokens=2)) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


@pytest.mark.parametrize(
    ("path", "method"),
    [("/v1/chat/completions", "POST"), ("/v1/models", "GET"), ("/health", "GET")],
)
def test_every_request_gets_an_answer_of_the_schema(api, path, method):
    @hypothesis.given(case=api[path][method].as_strategy())
    @hypothesis.settings(
        max_examples=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def answered(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "toy"  # so that it comes further than to status 404
        # What the schema allows may still be refused: an unreadable image, a missing question.
        case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])

    answered()


def test_the_schema_names_every_error():
    from moellava.chat.guard import ERRORS
    from moellava.chat.server import create_app

    class Processor:
        chat_template = "x"

    class Loaded:
        processor = Processor()

    paths = create_app(Loaded(), name="toy").openapi()["paths"]
    responses = paths["/v1/chat/completions"]["post"]["responses"]
    assert {int(status) for status in responses} == {200, *ERRORS}
    assert "text/event-stream" in responses["200"]["content"]
