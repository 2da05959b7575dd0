"""Chat templates for messages of text and images, with the marks that training masks need."""

import re
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from moellava.model.template_limits import require_bounded_template

# A message's content is a string or a list of items; an image is a line of its own, as in LLaVA.
_CONTENT = (
    "{%- macro text_of(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}{%- for item in content -%}"
    "{%- if item['type'] == 'image' -%}{{ '<image>\n' }}{%- else -%}{{ item['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
)

# TinyLlama-Chat: <|role|>, newline, text, </s>, newline.
TINYLLAMA = _CONTENT + (
    "{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|>\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ text_of(message['content']) + eos_token }}{%- endgeneration -%}"
    "{%- else -%}{{ text_of(message['content']) + eos_token }}{%- endif -%}"
    "{{ '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}"
)

# Vicuna v1, the format of LLaVA-1.5 and MoE-LLaVA: "USER: ... ASSISTANT: ...</s>".
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
VICUNA_V1 = _CONTENT + (
    "{%- if messages[0]['role'] != 'system' -%}{{ '"
    + _VICUNA_SYSTEM.replace("'", "\\'")
    + " ' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ text_of(message['content']) + ' ' }}"
    "{%- elif message['role'] == 'user' -%}{{ 'USER: ' + text_of(message['content']) + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' }}"
    "{%- generation -%}{{ text_of(message['content']) + eos_token }}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)

# LLaVA's first stage: the image, the caption, a line feed. Roles and questions are left out, as
# LLaVA leaves them out.
PLAIN = _CONTENT + (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ text_of(message['content']) + '\n' }}{%- endgeneration -%}"
    "{%- elif message['content'] is not string -%}"
    "{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

TEMPLATES = {"tinyllama": TINYLLAMA, "vicuna_v1": VICUNA_V1, "plain": PLAIN}

# Control characters around a number tell, in what the own template wrote, where an assistant's text
# begins and ends. The number is the length of all texts, so that no text holds a mark by accident.
_START, _STOP = "'\\x02' ~ flat.size ~ '\\x02'", "'\\x03' ~ flat.size ~ '\\x03'"
# What the model's own template writes is taken apart at them: END is the text that ends a turn.
_MARK_WRITTEN = (
    "{%- for piece in written.split(flat.start) -%}"
    "{%- set text, stop, rest = piece.partition(flat.stop) -%}"
    "{%- if loop.first or not stop -%}{{ piece }}"
    "{%- else -%}"
    "{%- set end = END if rest.startswith(END) else '' -%}"
    "{%- generation -%}{{ text + end }}{%- endgeneration -%}"
    "{{ rest[end | length :] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

# Turns on which two templates must agree: with and without a system turn, and with spaces that a
# template may trim.
_PROBE = "qqq"
_QUESTION = {"role": "user", "content": f" {_PROBE}"}
_ANSWER = {"role": "assistant", "content": " a "}
_SAMPLES = (
    [{"role": "system", "content": "s"}, _QUESTION, _ANSWER, _QUESTION],
    [_QUESTION, _ANSWER, _QUESTION, _ANSWER],
    [_QUESTION],
)


def multimodal_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for a language model: its own format, with images and with training's marks.

    A model whose own template writes the same text as one of `TEMPLATES` gets that one. Any other
    template is kept; messages are flattened before it, and the assistant's turns in what it writes
    are marked, up to and including the text that ends a turn (`<|im_end|>`, `<|eot_id|>`, ...). If
    that changes the text, because a template takes answers apart, or if a template has marks of its
    own, it is kept without ours. A model without a template (a base model) gets `vicuna_v1`,
    LLaVA's. Of several named templates, the one named `default` counts.

    The template writes the beginning-of-text token if the tokenizer would write one.

    Raises:
        ValueError: if there are named templates, but none is called `default`.
    """
    return _with_beginning(tokenizer, _choose_template(tokenizer, _own_template(tokenizer)))


def _choose_template(tokenizer: PreTrainedTokenizerBase, own: str | None) -> str:
    if own is None:
        return VICUNA_V1
    flattened = flatten_messages("text") + own
    if not reads_strings(tokenizer, flattened):
        return own  # of a model with images: it reads content items itself
    candidates = list(TEMPLATES.values())
    if "endgeneration" not in own:
        end = end_of_turn(tokenizer, flattened)
        candidates += [with_marks(own, end, text) for text in ("text", "(text | trim)")]
    for candidate in candidates:
        if _render_alike(tokenizer, flattened, candidate):
            return candidate
    return flattened


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    own: str | dict[str, str] | None = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise ValueError(
                f"The tokenizer has the chat templates {', '.join(sorted(own))}, but none is "
                "called 'default'. Set tokenizer_config.json's chat_template to the one to use."
            )
        own = own["default"]
    if own is not None:
        require_bounded_template(own, tokenizer.name_or_path)
    return own


def _with_beginning(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The template, with the beginning-of-text token if only the tokenizer writes it so far.

    A server that renders a template and tokenizes the text without special tokens, as OpenAI-style
    servers do, then gives the model what it was trained on.
    """
    ids = tokenizer("a")["input_ids"]
    if tokenizer.bos_token is None or not ids or ids[0] != tokenizer.bos_token_id:
        return template
    items = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    written = _render(tokenizer, template, items, False)
    if written is None or written.startswith(tokenizer.bos_token):
        return template
    return "{{- bos_token -}}" + template


def has_beginning(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a template has written the beginning-of-text token: the tokenizer adds no second."""
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


def flatten_messages(text: str) -> str:
    """The beginning of a template that sees messages with plain text.

    Args:
        text: the Jinja expression of a message's new content; `text` is its text.
    """
    return _CONTENT + (
        "{%- set flat = namespace(messages=[], size=0) -%}"
        "{%- for message in messages -%}"
        "{%- set flat.size = flat.size + text_of(message['content']) | length -%}"
        "{%- endfor -%}"
        "{%- set flat.start, flat.stop = " + _START + ", " + _STOP + " -%}"
        "{%- for message in messages -%}"
        "{%- set text = text_of(message['content']) -%}"
        "{%- set flat.messages = flat.messages + [dict(message, content=" + text + ")] -%}"
        "{%- endfor -%}"
        "{%- set messages = flat.messages -%}"
    )


def with_marks(own: str, end: str, text: str) -> str:
    """The template `own`, with marks around each assistant's turn.

    Args:
        end: what ends a turn, and belongs to it.
        text: the Jinja expression of the assistant's text.
    """
    marked = f"flat.start + {text} + flat.stop if message['role'] == 'assistant' else text"
    written = "{%- set written %}" + own + "{% endset -%}"
    return flatten_messages(marked) + written + _MARK_WRITTEN.replace("END", jinja_string(end))


def reads_strings(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template writes the content of a message that is a string."""
    written = _render(tokenizer, template, [_QUESTION], False)
    return written is None or _PROBE in written


def jinja_string(text: str) -> str:
    """Text as a string literal of Jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """What a template writes after an assistant's text: `</s>`, `<|im_end|>`, ...

    White space before it belongs to it: the model has to write that too, to reach the end.
    """
    stop = "qqqstop"
    turns = [_QUESTION, {"role": "assistant", "content": stop}]
    written = _render(tokenizer, template, turns, False) or ""
    found = re.match(r"\s*\S+", written.rpartition(stop)[2])
    return found[0] if found else ""


def _render_alike(tokenizer: PreTrainedTokenizerBase, first: str, second: str) -> bool:
    return all(
        _render(tokenizer, first, sample, prompt) == _render(tokenizer, second, sample, prompt)
        for sample in _SAMPLES
        for prompt in (False, True)
    )


def _render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: list[dict[str, Any]],
    prompt: bool,
) -> str | None:
    try:
        written = tokenizer.apply_chat_template(
            list(messages),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except jinja2.TemplateError:  # a template may refuse a system turn
        return None
    return str(written)
