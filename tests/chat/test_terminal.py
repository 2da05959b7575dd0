import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nibabel.testing import data_path
from pydicom.data import get_testdata_file

from moellava.chat.terminal import TerminalChat
from moellava.cli.chat import parse_view
from moellava.model.conversation import Conversation

VOLUME = str(Path(data_path) / "anatomical.nii")
CT = str(get_testdata_file("CT_small.dcm", download=False))


class Person:
    """Types lines, and keeps what is printed."""

    def __init__(self, *lines):
        self.lines = list(lines)
        self.printed = []

    def read(self, prompt):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, type):
            raise line
        return line

    @property
    def text(self):
        return "".join(self.printed)


def run(loaded, *lines, images=(), **options):
    person = Person(*lines)
    chat = TerminalChat(
        loaded,
        person.read,
        person.printed.append,
        parse_view,
        generation={"max_new_tokens": 6},
        **options,
    )
    chat.run(images)
    return chat, person


def test_answers_are_streamed(loaded, scan):
    _, person = run(loaded, "What is this?", images=[scan])
    expected = loaded.answer(scan, "What is this?", max_new_tokens=6)[0]
    assert f"{expected}\n" in person.text
    assert len(person.printed) > 4


def test_an_image_goes_with_the_next_question_only(loaded, scan):
    chat, _ = run(loaded, "Hello?", f"/image {scan}", "What is this?", "Why?")
    counts = [len(turn.pictures) for turn in chat.conversation.turns if turn.role == "user"]
    assert counts == [0, 1, 0]


def test_several_images_may_be_quoted(loaded, scan):
    escaped = scan.replace(" ", "\\ ")
    chat, _ = run(loaded, f"/image '{scan}' {escaped} {CT}", "What is this?")
    assert [len(turn.pictures) for turn in chat.conversation.turns] == [3, 0]


def test_a_model_without_a_chat_template_is_refused(loaded, monkeypatch):
    monkeypatch.setattr(loaded.processor, "chat_template", None)
    with pytest.raises(ValueError, match=r"no chat template.*Add chat_template\.jinja"):
        run(loaded, "Hello?")


def test_a_window_is_for_the_images_that_follow_or_wait(loaded):
    chat, _ = run(loaded, f"/image {CT}", "/window lung", "What?", f"/image {CT}", "And this?")
    views = [p.view for turn in chat.conversation.turns for p in turn.pictures]
    assert views == [{"window": "lung"}, {"window": "lung"}]


def test_slices_are_shown_until_they_are_taken_back(loaded):
    chat, person = run(
        loaded,
        "/slices 3",
        f"/image {VOLUME}",
        "What?",
        f"/image {CT}",
        "/slices none",
        f"/image {CT}",
        "And this?",
        view={"window": (4000, 8000)},
    )
    asked = [turn for turn in chat.conversation.turns if turn.role == "user"]
    assert asked[0].text.startswith("slice 1 of 3, axial: slice 2 of 3, axial: ")
    assert [len(turn.pictures) for turn in asked] == [3, 1]
    assert "error: " in person.text
    assert "is not a volume; slices= is for NIfTI" in person.text


def test_mistakes_are_said_and_the_chat_goes_on(loaded, scan, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    chat, person = run(
        loaded,
        "/imag x",
        "/image none.png",
        "/window lungs",
        "/save",
        "/save nowhere/chat.json",
        f"/image {broken}",
        "What is this?",
        "/reset",
        "Hello?",
    )
    for error in (
        "Unknown command 'imag'. Did you mean 'image'?",
        "The image none.png does not exist.",
        "Unknown window 'lungs'. Did you mean 'lung'?",
        "Give a file: /save chat.json",
        "nowhere/chat.json cannot be written: nowhere is not a folder.",
        f"{broken} cannot be read as an image",
    ):
        assert f"error: {error}" in person.text
    assert [turn.role for turn in chat.conversation.turns] == ["user", "assistant"]


def test_reset_keeps_the_system_prompt(loaded):
    chat, _ = run(loaded, "Hello?", "/reset", system="Be brief.")
    assert [turn.role for turn in chat.conversation.turns] == ["system"]


def test_save_writes_what_was_said(loaded, scan, tmp_path):
    file = tmp_path / "chat.json"
    chat, _ = run(loaded, f"/image {scan}", "What?", f"/save {file}", model_name="toy")
    saved = json.loads(file.read_text())
    assert saved["model"] == "toy"
    assert saved["settings"] == {"max_new_tokens": 6}
    (question, answer) = saved["messages"]
    assert question["content"] == [
        {"type": "image", "image": "a scan.png"},
        {"type": "text", "text": "What?"},
    ]
    assert answer["content"][0]["text"] == chat.conversation.turns[-1].text


def test_ctrl_c_stops_the_answer_and_not_the_chat(loaded, monkeypatch):
    printed = []

    def write(text):
        printed.append(text)
        if len(printed) == 3:  # in the middle of the first answer
            raise KeyboardInterrupt

    person = Person("Hello?", KeyboardInterrupt, "Why?")
    chat = TerminalChat(loaded, person.read, write, parse_view, generation={"max_new_tokens": 100})
    chat.run()
    assert " [stopped]\n" in printed
    assert [turn.role for turn in chat.conversation.turns] == ["user", "assistant"] * 2


def test_ctrl_c_while_an_image_is_encoded_keeps_the_chat_and_the_image(loaded, scan, monkeypatch):
    encode = loaded.model.get_image_features
    calls = []

    def interrupted_once(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return encode(*args, **options)

    monkeypatch.setattr(loaded.model, "get_image_features", interrupted_once)
    chat, person = run(loaded, f"/image {scan}", "What is this?", "Once more?")
    assert " [stopped]\n" in person.text
    assert [len(turn.pictures) for turn in chat.conversation.turns] == [1, 0]


def test_words_after_quit_do_not_matter(loaded):
    _, person = run(loaded, "/quit now", "Hello?")
    assert person.lines == ["Hello?"]


@pytest.mark.slow
def test_the_command_in_a_process(checkpoint, scan, loaded):
    command = [sys.executable, "-m", "moellava.cli", "chat", checkpoint, scan]
    options = ["--device", "cpu", "--max-new-tokens", "4"]
    result = subprocess.run(
        [*command, *options], input="What is this?\n/quit\n", capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    expected = Conversation(loaded).ask("What is this?", scan, max_new_tokens=4)
    assert expected in result.stdout


@pytest.mark.slow
def test_a_signal_stops_the_answer_and_not_the_process(checkpoint):
    command = [sys.executable, "-u", "-m", "moellava.cli", "chat", checkpoint]
    options = ["--device", "cpu", "--max-new-tokens", "1500"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # A pipe that is full holds the answer up until the signal comes, however slow this process is.
    # Tests that were started in a shell's background have SIGINT ignored, and so would the command.
    with subprocess.Popen(
        [*command, *options],
        **pipes,
        pipesize=4096,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        process.stdin.write("Hello?\n")
        process.stdin.flush()
        while "> " not in (text := process.stdout.read(1)):
            if text == ">":
                break
        process.stdout.read(40)  # the answer has begun
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        rest, _ = process.communicate("/quit\n", timeout=60)
    assert "[stopped]" in rest
    assert process.returncode == 0
