"""A page's uploads and conversation, against `Conversation` and `explain`."""

import json
import threading
from pathlib import Path

import pytest

from moellava.chat.web.session import Session, Sessions, WebLimits
from moellava.explain import explain
from moellava.model.conversation import Conversation

OPTIONS = {"name": "toy", "system": None}


@pytest.fixture
def session(loaded, tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    return Session(loaded, folder, limits=WebLimits(), **OPTIONS)


def ask(session, question="What is this?", **settings):
    for _ in session.ask(question, **{"max_new_tokens": 6, **settings}):
        pass
    return session.exchanges[-1].answer


def files(session):
    return [path for path in session._folder.rglob("*") if path.is_file()]


def test_an_answer_is_that_of_a_conversation(session, loaded, ct, png):
    expected = Conversation(loaded)
    images = [{"image": ct, "window": "lung"}, png]
    answers = [
        expected.ask("What is this?", images, max_new_tokens=6),
        expected.ask("Why?", max_new_tokens=6),
    ]
    assert session.add_files([ct, png]) == []
    session.images[0].choose_window("lung")
    assert [ask(session), ask(session, "Why?")] == answers


def test_an_answer_grows(session):
    steps = session.ask("Hello?", max_new_tokens=100)
    lengths = [len(session.exchanges[-1].answer) for _ in steps]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0  # the question is seen before the model has read it
    assert 0 < lengths[1] < len(session.exchanges[-1].answer)


def test_the_model_reads_the_question_while_it_is_shown(session, monkeypatch):
    begun, generate = threading.Event(), session.loaded.model.generate

    def noted(**inputs):
        begun.set()
        return generate(**inputs)

    monkeypatch.setattr(session.loaded.model, "generate", noted)
    steps = session.ask("Hello?", max_new_tokens=100)
    next(steps)
    assert begun.wait(10)
    steps.close()  # the page was left
    assert not session._conversation._is_answering


def test_an_image_is_sent_again_only_if_its_view_has_changed(session, ct):
    session.add_files([ct])
    ask(session)
    ask(session, "Why?")
    session.images[0].choose_window("bone")
    ask(session, "And now?")
    sent = [[view for _, view in exchange.sources] for exchange in session.exchanges]
    assert sent == [[{}], [], [{"window": "bone"}]]
    session.reset()
    ask(session)
    assert len(session.exchanges[0].sources) == 1


def test_stop_ends_the_answer_and_keeps_what_came(session):
    steps = session.ask("Hello?", max_new_tokens=1000)
    for _ in range(2):  # until it has begun
        next(steps)
    session.stop()
    for _ in steps:
        pass
    (exchange,) = session.exchanges
    assert exchange.note == "stopped"
    assert exchange.answer
    assert len(session.loaded.tokenizer(exchange.answer)["input_ids"]) < 500
    assert ask(session, "Why?")  # the stop was for one answer


@pytest.mark.parametrize(
    ("question", "settings", "message"),
    [
        (" ", {}, "The question is empty"),
        ("x" * 8001, {}, "8,001 characters; the limit is 8,000"),
        ("What?", {"max_new_tokens": 5000}, "tokens would be cut"),
    ],
)
def test_a_refused_question_changes_nothing(session, ct, question, settings, message):
    session.add_files([ct])
    with pytest.raises(ValueError, match=message):
        ask(session, question, **settings)
    assert not session.exchanges
    assert session.images[0].is_waiting
    assert ask(session)


def test_ten_images_where_the_context_holds_fewer_are_counted(session, loaded, ct):
    num_images = loaded.context_len // 196 + 1
    copies = [Path(ct).with_name(f"{number}.dcm") for number in range(num_images)]
    for copy in copies:
        copy.write_bytes(Path(ct).read_bytes())
        session.add_files([str(copy)])  # one by one: together they are a series of slices
    with pytest.raises(ValueError, match=rf"\({196 * num_images} of images"):
        ask(session)
    for image in session.images[1:]:
        session.remove(image)
    assert ask(session)


def test_an_answer_that_fails_is_taken_back(session, ct, monkeypatch):
    session.add_files([ct])
    with monkeypatch.context() as patch:
        patch.setattr(session.loaded.model, "generate", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ask(session)
    assert not session.exchanges
    assert session.images[0].is_waiting
    assert ask(session)


class TestExplanation:
    def test_it_is_of_the_last_answer(self, session, loaded, png):
        copy = Path(png).read_bytes()
        session.add_files([png])
        answer = ask(session)
        found = session.explain()
        assert found.answer == answer
        expected = explain(loaded, copy, "What is this?", answer=answer)
        assert found.attention == pytest.approx(expected.attention, abs=1e-5)
        assert session.explain() is found
        assert session.explain(ablation=True).ablation is not None

    def test_it_takes_the_earlier_turns_with_their_images(self, session, loaded, ct, png):
        items = [{"type": "image", "image": Path(path).read_bytes()} for path in (ct, png)]
        session.add_files([ct])
        answers = [ask(session, "First?")]
        session.add_files([png])
        answers += [ask(session, "Second?")]
        found = session.explain()
        turns = [
            {"role": "user", "content": [items[0], {"type": "text", "text": "First?"}]},
            {"role": "assistant", "content": answers[0]},
            {"role": "user", "content": [items[1], {"type": "text", "text": "Second?"}]},
        ]
        expected = explain(loaded, None, turns, answer=answers[1])
        assert [found.answer, found.question] == [answers[1], "Second?"]
        assert found.attention == pytest.approx(expected.attention, abs=1e-5)
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)

    def test_without_an_answer_or_an_image_there_is_none(self, session):
        with pytest.raises(ValueError, match="no answer to explain"):
            session.explain()
        ask(session, "Hello?")
        with pytest.raises(ValueError, match="no image to explain"):
            session.explain()


class TestUploads:
    def test_they_are_taken_over_and_deleted_with_the_page(self, session, ct, png):
        session.add_files([ct, png])
        assert not Path(ct).exists()
        assert len(files(session)) == 2
        session.remove(session.images[1])
        assert [path.name for path in files(session)] == ["CT_small.dcm"]
        folder = session._folder
        session.close()
        assert not folder.exists()

    def test_what_was_asked_about_is_kept_for_its_explanation(self, session, png):
        session.add_files([png])
        ask(session)
        session.remove(session.images[0])
        assert session.explain().answer == session.exchanges[0].answer

    def test_a_file_that_is_no_image_is_deleted_at_once(self, session, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text("x")
        (error,) = session.add_files([str(path)])
        assert error.startswith("a.txt cannot be read as an image")
        assert not files(session)

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            (WebLimits(files=1), "2 files; the limit is 1"),
            (WebLimits(session_bytes=50_000), "bytes together; the limit is 50,000"),
        ],
    )
    def test_too_many_of_them(self, loaded, tmp_path, ct, png, limits, message):
        session = Session(loaded, tmp_path, limits=limits, **OPTIONS)
        assert session.add_files([ct]) == []
        (error,) = session.add_files([png])
        assert message in error
        assert [path.name for path in files(session)] == ["CT_small.dcm"]


def test_the_saved_conversation_has_settings_views_and_no_pixels(session, ct):
    session.add_files([ct])
    session.images[0].choose_window("lung")
    ask(session)
    saved = json.loads(session.saved())
    assert saved["model"] == "toy"
    assert saved["settings"] == {"max_new_tokens": 6}
    question, answer = saved["messages"]
    assert question["content"][0] == {"type": "image", "image": "CT_small.dcm", "window": "lung"}
    assert answer["content"][0]["text"] == session.exchanges[0].answer


def test_pages_are_bounded_and_one_that_is_left_makes_room(loaded, tmp_path):
    sessions = Sessions(loaded, tmp_path, limits=WebLimits(sessions=2), **OPTIONS)
    first = sessions.get("a")
    assert sessions.get("a") is first
    sessions.get("b")
    with pytest.raises(ValueError, match="2 pages are open, the limit"):
        sessions.get("c")
    sessions.close("a")
    assert sessions.get("c") is not first
    sessions.close_all()
    assert not list(tmp_path.rglob("page-*"))


def test_an_upload_that_no_page_took_over_goes_with_the_last_page(loaded, tmp_path):
    sessions = Sessions(loaded, tmp_path, limits=WebLimits(), **OPTIONS)
    for key in "ab":
        sessions.get(key)
    (sessions.arrivals / "1f").mkdir()
    (sessions.arrivals / "1f" / "scan.png").touch()
    (sessions.arrivals / "part").touch()
    sessions.close("a")
    assert len(list(sessions.arrivals.iterdir())) == 2
    sessions.close("b")
    assert not list(sessions.arrivals.iterdir())
