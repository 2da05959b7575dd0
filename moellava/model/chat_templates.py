"""Chat templates for messages of text and images, with the marks that training masks need."""

import jinja2
from transformers import PreTrainedTokenizerBase

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

# Control characters around an assistant's text tell where it is in what the own template wrote.
_START, _STOP = "\x02", "\x03"
# What the model's own template writes is taken apart at them: END is the text that ends a turn.
_MARK_WRITTEN = (
    "{%- for piece in written.split('\\x02') -%}"
    "{%- if loop.first -%}{{ piece }}"
    "{%- elif '\\x03' not in piece -%}{{ '\\x02' + piece }}"
    "{%- else -%}"
    "{%- set halves = piece.split('\\x03') -%}"
    "{%- set end = END if halves[1].startswith(END) else '' -%}"
    "{%- generation -%}{{ halves[0] + end }}{%- endgeneration -%}"
    "{{ halves[1][end | length :] }}"
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
    LLaVA's.
    """
    own: str | None = tokenizer.chat_template
    if own is None:
        return VICUNA_V1
    flattened = flatten_messages("text") + own
    if not reads_strings(tokenizer, flattened):
        return own  # of a model with images: it reads content items itself
    candidates = list(TEMPLATES.values())
    if "endgeneration" not in own:
        end = _end_of_turn(tokenizer, flattened)
        candidates += [with_marks(own, end, text) for text in ("text", "(text | trim)")]
    for candidate in candidates:
        if _render_alike(tokenizer, flattened, candidate):
            return candidate
    return flattened


def flatten_messages(text: str) -> str:
    """The beginning of a template that sees messages with plain text.

    Args:
        text: the Jinja expression of a message's new content; `text` is its text.
    """
    return _CONTENT + (
        "{%- set flat = namespace(messages=[]) -%}"
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
    marked = f"'\\x02' + {text} + '\\x03' if message['role'] == 'assistant' else text"
    written = "{%- set written %}" + own + "{% endset -%}"
    return flatten_messages(marked) + written + _MARK_WRITTEN.replace("END", jinja_string(end))


def reads_strings(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template writes the content of a message that is a string."""
    written = _render(tokenizer, template, [_QUESTION], False)
    return written is None or _PROBE in written


def jinja_string(text: str) -> str:
    """Text as a string literal of Jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """What a template writes after an assistant's text, up to the first white space: `</s>`, ..."""
    turns = [_QUESTION, {"role": "assistant", "content": _STOP}]
    written = _render(tokenizer, template, turns, False) or ""
    after = written.rpartition(_STOP)[2].split()
    return after[0] if after else ""


def _render_alike(tokenizer: PreTrainedTokenizerBase, first: str, second: str) -> bool:
    return all(
        _render(tokenizer, first, sample, prompt) == _render(tokenizer, second, sample, prompt)
        for sample in _SAMPLES
        for prompt in (False, True)
    )


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, str]], prompt: bool
) -> str | None:
    try:
        written = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except jinja2.TemplateError:  # a template may refuse a system turn
        return None
    return str(written)
