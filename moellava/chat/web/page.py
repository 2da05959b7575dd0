"""The page itself: what is where, and which function answers which click.

| name | gives |
|---|---|
| `build_page` | gradio's `Blocks` over the open sessions |
"""

from collections.abc import Iterator, Sequence
from html import escape

import gradio as gr

from moellava.chat.web.images import CUSTOM, PageImage
from moellava.chat.web.render import NO_DEVICE, chat_messages, explanation_panel, viewer
from moellava.chat.web.session import Session, Sessions
from moellava.explain import KINDS

PRESETS = (
    "What modality is this?",
    "Which organ is shown?",
    "Is anything abnormal?",
    "Describe the image.",
)
_MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # one queue for all that computes
_QUIET = {"show_progress": "hidden", "api_visibility": "private"}
_DRAGGED = {**_QUIET, "trigger_mode": "always_last"}
# The JSON goes from the page to the browser's downloads; no file is made on the server.
_DOWNLOAD = """(text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "conversation.json";
  link.click();
}"""


def build_page(sessions: Sessions, *, max_new_tokens: int) -> gr.Blocks:
    """The page; every browser tab that opens it has a session of its own."""
    with gr.Blocks(
        title=f"{sessions.name} · moellava", analytics_enabled=False, delete_cache=(60, 3600)
    ) as page:
        gr.HTML(_banner(sessions.name), elem_id="moellava-banner")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                images = _Images(sessions)
            with gr.Column(scale=3, min_width=320):
                _Chat(sessions, images, max_new_tokens)

        def close(request: gr.Request) -> None:
            sessions.close(str(request.session_hash))

        page.unload(close)
    page.queue(default_concurrency_limit=2)
    return page


def _banner(name: str) -> str:
    return (
        f'<div class="moellava-head"><h1>{escape(name)}</h1>'
        f"<strong>{NO_DEVICE}</strong><span>Files stay on the machine that runs this page, and are "
        "deleted when you close it.</span></div>"
    )


def _session(sessions: Sessions, request: gr.Request) -> Session:
    try:
        return sessions.get(str(request.session_hash))
    except ValueError as error:
        raise _problem(error) from None


def _problem(error: Exception) -> gr.Error:
    return gr.Error(escape(" ".join(str(error).split())), duration=20, print_exception=False)


class _Images:
    """Uploads, the one that is shown, and what of it: slice, plane, window."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self.files = gr.File(
            label="PNG, JPEG, DICOM, NIfTI",
            file_count="multiple",
            height=140,
            elem_id="moellava-files",
        )
        self.choice = gr.Radio([], label="Shown", visible=False, elem_id="moellava-choice")
        self.viewer = gr.HTML(elem_id="moellava-viewer")
        self.frame = gr.Slider(0, 1, step=1, label="Slice", visible=False, elem_id="moellava-frame")
        self.plane = gr.Radio([], label="Plane", visible=False)
        self.window = gr.Radio([], label="Window", visible=False, elem_id="moellava-window")
        with gr.Row():
            self.center = gr.Slider(
                0, 1, label="Center", visible=False, min_width=140, elem_id="moellava-center"
            )
            self.width = gr.Slider(
                1, 2, label="Width", visible=False, min_width=140, elem_id="moellava-width"
            )
        self.remove = gr.Button("Remove this image", size="sm", visible=False)
        self.all = [
            *(self.choice, self.viewer, self.frame, self.plane, self.window),
            *(self.center, self.width, self.remove),
        ]
        self._listen()

    def _listen(self) -> None:
        chosen, shown = self.choice, [self.choice, self.viewer]
        self.files.upload(self._upload, self.files, [self.files, *self.all], **_QUIET)
        chosen.input(self._show, chosen, self.all, **_QUIET)
        self.remove.click(self._remove, chosen, self.all, **_QUIET)
        self.plane.input(self._plane, [chosen, self.plane], self.all, **_QUIET)
        self.window.input(self._window, [chosen, self.window], self.all, **_QUIET)
        self.frame.input(self._frame, [chosen, self.frame], shown, **_DRAGGED)
        for slider in (self.center, self.width):
            slider.input(
                self._greys,
                [chosen, self.center, self.width],
                [*shown, self.window],
                **_DRAGGED,
            )

    def _upload(self, uploads: Sequence[str] | None, request: gr.Request) -> list[object]:
        session = _session(self._sessions, request)
        num_before = len(session.images)
        for message in session.add_files(uploads or ()):
            gr.Warning(escape(message), duration=20)
        last = len(session.images) - 1
        return [None, *self.update(session, min(num_before, last) if last >= 0 else None)]

    def _show(self, number: int | None, request: gr.Request) -> list[object]:
        return self.update(_session(self._sessions, request), number)

    def _remove(self, number: int | None, request: gr.Request) -> list[object]:
        session = _session(self._sessions, request)
        image = _at(session, number)
        if image is not None:
            session.remove(image)
        return self.update(session, 0 if session.images else None)

    def _plane(self, number: int | None, plane: str, request: gr.Request) -> list[object]:
        session = _session(self._sessions, request)
        image = _at(session, number)
        if image is not None and plane in image.planes:
            image.choose_plane(plane)
        return self.update(session, number)

    def _window(self, number: int | None, window: str, request: gr.Request) -> list[object]:
        session = _session(self._sessions, request)
        image = _at(session, number)
        if image is not None and window in image.windows:
            image.choose_window(window)
        return self.update(session, number)

    def _frame(self, number: int | None, frame: float, request: gr.Request) -> list[object]:
        session = _session(self._sessions, request)
        image = _at(session, number)
        if image is not None:
            image.choose_frame(int(frame))
        return self.update(session, number)[:2]

    def _greys(
        self, number: int | None, center: float, width: float, request: gr.Request
    ) -> list[object]:
        session = _session(self._sessions, request)
        image = _at(session, number)
        if image is not None and image.windows:
            image.choose_greys(center, width)
        return [*self.update(session, number)[:2], gr.update(value=CUSTOM)]

    def update(self, session: Session, number: int | None) -> list[object]:
        """New values for `all`, with this image shown."""
        image = _at(session, number)
        if image is None:
            return [gr.update(visible=False), "", *(gr.update(visible=False) for _ in self.all[2:])]
        center, width = image.center_and_width
        low, high = image.info.grey_range or (0.0, 1.0)
        low, high, most = min(low, center), max(high, center), max(high - low, width, 2)
        is_grey = bool(image.windows)
        return [
            gr.update(choices=_labels(session), value=number, visible=True),
            viewer(session.loaded, image),
            gr.update(
                maximum=max(image.num_frames - 1, 1),
                value=image.frame,
                visible=image.num_frames > 1,
            ),
            gr.update(
                choices=list(image.planes),
                value=image.view.get("plane"),
                visible=bool(image.planes),
            ),
            gr.update(choices=list(image.windows), value=image.window_name, visible=is_grey),
            gr.update(minimum=low, maximum=high, value=center, visible=is_grey),
            gr.update(minimum=1, maximum=most, value=width, visible=is_grey),
            gr.update(visible=True),
        ]


class _Chat:
    """Questions, answers, and what lies behind the last answer."""

    def __init__(self, sessions: Sessions, images: _Images, max_new_tokens: int) -> None:
        self._sessions = sessions
        self._images = images
        self.chat = gr.Chatbot(
            show_label=False,
            height="52vh",
            min_height=260,
            elem_id="moellava-chat",
            placeholder="Add an image and ask about it.",
            buttons=["copy"],
            feedback_options=None,
            latex_delimiters=[],
        )
        with gr.Row():
            presets = [gr.Button(text, size="sm", min_width=130) for text in PRESETS]
        self.question = gr.Textbox(
            show_label=False,
            placeholder="Ask about the images",
            submit_btn="Ask",
            max_lines=6,
            max_length=sessions.limits.question,
            elem_id="moellava-question",
        )
        with gr.Accordion("Settings", open=False):
            self.max_new_tokens = gr.Slider(
                1, 1024, max_new_tokens, step=1, label="Longest answer, in tokens"
            )
            self.temperature = gr.Slider(
                0, 2, 0, step=0.05, label="Temperature (0: the likeliest answer)"
            )
        with gr.Row():
            self.explain = gr.Button("Show where it looked", size="sm", min_width=130)
            self.reset = gr.Button("New conversation", size="sm", min_width=130)
            self.save = gr.Button("Download conversation", size="sm", min_width=130)
        with gr.Accordion("Where the model looked", open=True, visible=False) as self.looked:
            self.kind = gr.Radio(list(KINDS), value="attention", label="Map")
            self.overlay = gr.HTML(elem_id="moellava-overlay", elem_classes="moellava-panel")
        with gr.Accordion("Which experts worked", open=False, visible=False) as self.worked:
            self.routes = gr.HTML(elem_id="moellava-routes", elem_classes="moellava-panel")
        self.saved = gr.Textbox(visible=False)
        self._listen(presets)

    def _listen(self, presets: Sequence[gr.Button]) -> None:
        settings = [self._images.choice, self.max_new_tokens, self.temperature]
        asked = [
            *(self.chat, self.question, self.looked, self.worked, self._images.choice),
        ]
        options = {**_QUIET, **_MODEL}
        self.question.submit(self._ask, [self.question, *settings], asked, **options)
        for preset in presets:
            preset.click(self._ask, [preset, *settings], asked, **options)
        self.question.stop(self._stop, **_QUIET)  # a queue of its own: it does not wait
        panel = [self.overlay, self.routes, self.looked, self.worked]
        explaining = {"api_visibility": "private", "show_progress_on": self.chat, **_MODEL}
        self.explain.click(self._explain, self.kind, panel, **explaining)
        self.kind.input(self._explain, self.kind, panel, **explaining)
        for cleared in (self.reset.click, self.chat.clear):  # the bin in the corner
            cleared(self._reset, self._images.choice, asked, **_QUIET)
        self.save.click(self._save, None, self.saved, **_QUIET).then(
            None, self.saved, None, js=_DOWNLOAD, **_QUIET
        )

    def _ask(
        self,
        question: str,
        number: int | None,
        max_new_tokens: int,
        temperature: float,
        request: gr.Request,
    ) -> Iterator[list[object]]:
        session = _session(self._sessions, request)
        settings: dict[str, object] = {"max_new_tokens": int(max_new_tokens)}
        if temperature > 0:
            settings |= {"do_sample": True, "temperature": float(temperature)}
        is_first = True
        try:
            for _ in session.ask(question, **settings):
                yield self._update(session, number, is_first=is_first, is_answering=True)
                is_first = False
        except (ValueError, OSError, ImportError) as error:
            yield self._update(session, number, is_first=False, is_answering=False)
            raise _problem(error) from None
        yield self._update(session, number, is_first=is_first, is_answering=False)

    def _update(
        self, session: Session, number: int | None, *, is_first: bool, is_answering: bool
    ) -> list[object]:
        """The conversation; at its first step the question goes, and what was explained."""
        buttons = {
            "submit_btn": False if is_answering else "Ask",
            "stop_btn": "Stop" if is_answering else False,
        }
        typed = gr.update(value="", **buttons) if is_first else gr.update(**buttons)
        hidden = gr.update(visible=False) if is_first else gr.skip()
        labels = gr.update(choices=_labels(session), value=number) if is_first else gr.skip()
        return [chat_messages(session), typed, hidden, hidden, labels]

    def _stop(self, request: gr.Request) -> None:
        _session(self._sessions, request).stop()

    def _explain(self, kind: str, request: gr.Request) -> list[object]:
        session = _session(self._sessions, request)
        try:
            explanation = session.explain(ablation=kind == "ablation")
            overlay, routes = explanation_panel(explanation, kind)
        except (ValueError, OSError, ImportError) as error:
            raise _problem(error) from None
        return [overlay, routes, gr.update(visible=True), gr.update(visible=True)]

    def _reset(self, number: int | None, request: gr.Request) -> list[object]:
        session = _session(self._sessions, request)
        try:
            session.reset()
        except ValueError as error:
            raise _problem(error) from None
        return self._update(session, number, is_first=True, is_answering=False)

    def _save(self, request: gr.Request) -> str:
        return _session(self._sessions, request).saved()


def _at(session: Session, number: int | None) -> PageImage | None:
    if number is None or not 0 <= number < len(session.images):
        return None
    return session.images[number]


def _labels(session: Session) -> list[tuple[str, int]]:
    """The images by name; those that go with the next question are marked."""
    return [
        (f"{image.name}{' · with the next question' if image.is_waiting else ''}", number)
        for number, image in enumerate(session.images)
    ]
