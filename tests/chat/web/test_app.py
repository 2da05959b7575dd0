"""What can be reached of the page over HTTP, and what cannot."""

import json
import re
import socket

import pytest
from huggingface_hub.utils import httpx

from moellava.chat.server import listening
from moellava.chat.web.session import WebLimits
from moellava.cli import app as cli

from .conftest import page_running

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def address(loaded, folder):
    limits = WebLimits(file_bytes=100_000, session_bytes=1_000_000)
    with page_running(loaded, folder, limits=limits) as found:
        yield found


def upload(address, content=b"x" * 1000, name="a.png"):
    url = f"{address}/gradio_api/upload"
    return httpx.post(url, files={"files": (name, content)}, timeout=30)


def join(address, number, *data, session="s"):
    body = {"data": data, "fn_index": number, "session_hash": session}
    return httpx.post(f"{address}/gradio_api/queue/join", json=body, timeout=30)


def call(address, number, *data, session="s"):
    """What gradio answers to a call of the page's function of this number."""
    assert join(address, number, *data, session=session).status_code == 200
    url, params = f"{address}/gradio_api/queue/data", {"session_hash": session}
    events = httpx.get(url, params=params, timeout=30).text
    found = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: ")]
    return next(item for item in found if item["msg"] == "process_completed")


def function(address, *, of):
    """The number of the function that a component's event calls."""
    config = httpx.get(f"{address}/config").json()
    ids = {c["id"] for c in config["components"] if c["props"].get("elem_id") == of}
    return next(d["id"] for d in config["dependencies"] if {t[0] for t in d["targets"]} & ids)


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://example.org/x"),
        *("/gradio_api/call/x", "/gradio_api/run/x", "/gradio_api/api/x", "/gradio_api/runs"),
        *("/gradio_api/deep_link", "/gradio_api/openapi.json", "/gradio_api/vibe-code/"),
        *("/monitoring", "/login", "/manifest.json", "/docs", "/openapi.json", "/x"),
    ],
)
def test_nothing_but_the_page_is_served(address, path):
    assert httpx.get(f"{address}{path}").status_code == 404


def test_an_upload_is_not_served_either(address):
    (path,) = upload(address).json()
    for name in (f"file={path}", f"file/{path}"):
        assert httpx.get(f"{address}/gradio_api/{name}").status_code == 404


def test_a_call_may_name_no_file_but_an_upload(address, tmp_path, ct):
    """A page takes over, and deletes, what it is given; gradio would fetch an address."""
    number = function(address, of="moellava-files")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        fetched = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        for path in (
            ct,
            fetched,
            "/etc/passwd",
            f"{upload(address).json()[0]}/../../../x",
            1,
            None,
        ):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            response = join(address, number, [file], session="other")
            assert response.status_code == 403
            assert "not uploaded" in response.text
        with pytest.raises(TimeoutError):
            listener.accept()
    (path,) = upload(address, b"x" * 500).json()
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    assert call(address, number, [file])["success"]


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"x" * 2**21])
def test_a_broken_call_is_refused(address, body):
    response = httpx.post(f"{address}/gradio_api/queue/join", content=body)
    assert response.status_code in (403, 413)


def test_too_large_an_upload_is_refused_and_not_kept(address, folder):
    before = {path for path in folder.rglob("*") if path.is_file()}
    response = upload(address, bytes(200_000))
    assert response.status_code == 413
    assert "maximum allowed size" in response.text
    assert {path for path in folder.rglob("*") if path.is_file() and path.stat().st_size} <= before


def test_a_body_of_2_gigabytes_is_refused_by_its_header(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2**31}"
        connection.sendall(f"{head}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(1000)


def test_a_body_without_a_length_is_cut_off(address, folder):
    def chunks():
        yield b'--x\r\nContent-Disposition: form-data; name="y"\r\n\r\n'
        for _ in range(100):
            yield bytes(100_000)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    try:
        response = httpx.post(f"{address}/gradio_api/upload", content=chunks(), headers=headers)
        assert response.status_code >= 400
    except httpx.TransportError:
        pass  # the connection was closed before all was sent
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert max(sizes, default=0) <= 1_000_000


def test_a_browser_that_reads_slowly_does_not_hold_up_others(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.recv(1)
        assert httpx.get(address).status_code == 200


def test_a_web_page_under_another_name_is_refused(address):
    response = httpx.get(address, headers={"host": "evil.example"})
    assert response.status_code == 400


def test_the_browser_is_told_to_fetch_nothing_from_elsewhere(address):
    response = httpx.get(address)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")
    assert not re.search(r"https?:|\*", policy)
    links = re.findall(r"<(?:link|script|img)[^>]*(?:href|src)=\"(https?:)?//", response.text)
    assert not links
    theme = httpx.get(f"{address}/theme.css").text
    assert not re.search(r"@import|url\((?![\"']?data:)", theme)
    assert "@font-face" not in theme


def test_gradio_records_and_shares_nothing(address):
    config = httpx.get(f"{address}/config").json()
    assert config["analytics_enabled"] is False
    assert not config.get("run_history")
    assert not config.get("footer_links")
    assert not httpx.get(f"{address}/gradio_api/info").json()["named_endpoints"]


def test_building_and_opening_the_page_needs_no_network(loaded, tmp_path, monkeypatch, no_network):
    from fastapi.testclient import TestClient

    from moellava.chat.web.app import create_web_app

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    app = create_web_app(loaded, tmp_path, name="toy", local_only=False)
    with TestClient(app) as client:
        assert "not a medical device" in client.get("/").text


def test_a_model_without_a_chat_template_is_refused(loaded, tmp_path, monkeypatch):
    from moellava.chat.web.app import create_web_app

    monkeypatch.setattr(loaded.processor, "chat_template", None)
    with pytest.raises(ValueError, match=r"no chat template.*Add chat_template\.jinja"):
        create_web_app(loaded, tmp_path, name="toy")


def test_a_port_in_use_is_said_before_the_model_is_loaded(checkpoint):
    from typer.testing import CliRunner

    with listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        result = CliRunner().invoke(cli, ["web", checkpoint, "--port", str(port)])
    assert result.exit_code == 1
    assert f"Port {port} of 127.0.0.1 is in use. Choose another: --port {port + 1}" in result.output


def test_without_gradio_the_message_says_what_to_install(checkpoint, monkeypatch):
    import sys

    from typer.testing import CliRunner

    for module in ("moellava.chat.web.app", "moellava.chat.web.page"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(cli, ["web", checkpoint])
    assert "The page needs gradio. Type: pip install 'moellava[web]'" in result.output
