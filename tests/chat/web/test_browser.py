"""The page as a person uses it, in headless Chromium."""

import json
import shutil
import socket
import time
from pathlib import Path

import pytest

from moellava.model.conversation import Conversation

from .conftest import CT, page_running

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
)

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"{CHROMIUM} is not there"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield found
        found.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def address(loaded, folder):
    with page_running(loaded, folder, max_new_tokens=8) as found:
        yield found


class Log:
    """What a page asked for, and what went wrong in it."""

    def __init__(self, page):
        self.addresses, self.problems = [], []
        page.on("request", lambda request: self.addresses.append(request.url))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on(
            "response",
            lambda response: response.ok or self.problems.append(response.url),
        )

    def foreign(self, address):
        own = (f"{address}/", "data:", "blob:")
        return [url for url in self.addresses if not url.startswith(own)]


@pytest.fixture
def opened(browser, address):
    """A page on a phone, in the dark, and its log."""
    size = {"width": 390, "height": 844}
    with browser.new_context(viewport=size, color_scheme="dark", accept_downloads=True) as context:
        page = context.new_page()
        page.set_default_timeout(15_000)
        log = Log(page)
        page.goto(address)
        yield page, log


def answers(page):
    return page.locator("#moellava-chat .bot.message")


def ask(page, text):
    page.locator("#moellava-question textarea").fill(text)
    page.locator("#moellava-question textarea").press("Enter")


def test_a_scan_is_uploaded_windowed_asked_about_and_explained(
    opened, address, folder, loaded, tmp_path
):
    page, log = opened
    expect = playwright.expect
    expect(page.get_by_text("Research only, not a medical device.")).to_be_visible()

    page.locator("#moellava-files input[type=file]").set_input_files(str(CT))
    pictures = page.locator("#moellava-viewer img")
    expect(pictures).to_have_count(2)
    expect(page.locator("#moellava-choice")).to_contain_text("with the next question")
    before = pictures.first.get_attribute("src")
    page.locator("#moellava-window").get_by_text("lung").click()
    expect(pictures.first).not_to_have_attribute("src", before)
    expect(page.locator("#moellava-center input[type=number]")).to_have_value("-600")
    in_lung_window = pictures.first.get_attribute("src")
    center = page.locator("#moellava-center input[type=number]")
    center.fill("-500")
    center.blur()
    expect(pictures.first).not_to_have_attribute("src", in_lung_window)

    ask(page, "What is this?")
    image = {"image": str(CT), "window": (-500.0, 1500.0)}
    expected = Conversation(loaded).ask("What is this?", image, max_new_tokens=8)
    expect(answers(page).last).to_have_text(" ".join(expected.split()), use_inner_text=True)
    expect(page.locator("#moellava-choice")).not_to_contain_text("with the next question")

    page.get_by_role("button", name="Show where it looked").click()
    expect(page.locator("#moellava-overlay img")).to_have_count(1, timeout=60_000)
    page.get_by_role("button", name="Which experts worked").click()
    expect(page.locator("#moellava-routes img").first).to_be_visible()

    with page.expect_download() as download:
        page.get_by_role("button", name="Download conversation").click()
    saved = tmp_path / "saved.json"
    shutil.copy(download.value.path(), saved)
    assert json.loads(saved.read_text())["messages"][1]["content"][0]["text"] == expected

    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.evaluate("Object.keys(localStorage).length + document.cookie.length")
    assert log.foreign(address) == []
    assert log.problems == []
    page.close()
    for _ in range(100):  # the server notices that the page has gone
        if not [path for path in folder.rglob("*") if path.is_file()]:
            break
        time.sleep(0.1)
    assert not [path for path in folder.rglob("*") if path.is_file()]


def test_an_answer_is_stopped_and_the_next_one_comes(opened):
    page, _ = opened
    expect = playwright.expect
    page.get_by_role("button", name="Settings").click()
    longest = page.get_by_label("number input for Longest answer, in tokens")
    longest.fill("1024")
    longest.blur()
    ask(page, "Hello?")
    page.get_by_role("button", name="Stop").click()
    expect(answers(page).last).to_contain_text("stopped")
    longest.fill("4")
    longest.blur()
    page.get_by_role("button", name="Describe the image.").click()
    expect(answers(page)).to_have_count(2)
    expect(page.get_by_role("button", name="Ask")).to_be_visible()


def test_a_text_that_names_an_address_makes_the_browser_fetch_nothing(opened):
    page, _ = opened
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(1)
        place = f"http://127.0.0.1:{listener.getsockname()[1]}"
        ask(page, f"![a]({place}/a.png) <img src={place}/b.png> <script src={place}/c></script>")
        playwright.expect(answers(page)).to_have_count(1)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_wrong_file_is_said_by_its_name(opened, tmp_path):
    page, _ = opened
    path = tmp_path / "letter.docx"
    path.write_bytes(b"PK" + bytes(400))
    page.locator("#moellava-files input[type=file]").set_input_files(str(path))
    message = page.get_by_text("letter.docx cannot be read as an image")
    playwright.expect(message).to_be_visible()
