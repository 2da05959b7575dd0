"""Chat templates whose messages hold text and images; assistant turns carry the marks that training masks need."""

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

# A message's content is a string or a list of items; an image stands on a line of its own, as in LLaVA.
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

# LLaVA's first stage: the image, the caption, a line feed. Roles and questions are left out, as LLaVA leaves them out.
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

# Flattens the messages, then hands them to the language model's own template, which stands between the two halves.
_FLATTEN = _CONTENT + (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set text = text_of(message['content']) -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=TEXT)] -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
# Control characters around an assistant's text tell, in what the own template has written, where it stands.
_PLACE = "\x04"  # not one of the marks, which a marked template takes out
_MARKED_TEXT = "'\\x02' + text + '\\x03' if message['role'] == 'assistant' else text"
_MARKED_TRIMMED_TEXT = _MARKED_TEXT.replace("+ text +", "+ (text | trim) +")
_BEFORE_OWN = "{%- set written %}"
_AFTER_OWN = (
    "{% endset -%}"
    "{%- for piece in written.split('\\x02') -%}"
    "{%- if loop.first -%}{{ piece }}{%- elif '\\x03' not in piece -%}{{ '\\x02' + piece }}{%- else -%}"
    "{%- set halves = piece.split('\\x03') -%}"
    "{%- set end = END if halves[1].startswith(END) else '' -%}"
    "{%- generation -%}{{ halves[0] + end }}{%- endgeneration -%}"
    "{{ halves[1][end | length :] }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

# Turns on which two templates must agree: with and without a system turn, and with spaces that a template may trim.
_QUESTION, _ANSWER = {"role": "user", "content": " qqq"}, {"role": "assistant", "content": " a "}
_SAMPLES = (
    [{"role": "system", "content": "s"}, _QUESTION, _ANSWER, _QUESTION],
    [_QUESTION, _ANSWER, _QUESTION, _ANSWER],
    [_QUESTION],
)


def multimodal_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for a language model: its own format, with images and with marks on the assistant's turns.

    A model whose own template writes the same text as one of `TEMPLATES` gets that one. Any other template is kept;
    messages are flattened before it, and the assistant's turns in what it writes are marked, up to and with the text
    that ends a turn (`<|im_end|>`, `<|eot_id|>`, ...). Where that changes the text, since a template takes answers
    apart, or where a template has marks of its own, it is kept without ours. A model without a template (a base
    model) gets `vicuna_v1`, LLaVA's.
    """
    own = tokenizer.chat_template
    if own is None:
        return VICUNA_V1
    flattened = _FLATTEN.replace("TEXT", "text") + own
    if "qqq" not in (_render(tokenizer, flattened, [_QUESTION], False) or "qqq"):
        return own  # of a model with images: it reads content items itself, and no strings
    candidates = list(TEMPLATES.values())
    if "endgeneration" not in own:
        end = jinja_string(end_of_turn(tokenizer, flattened))
        candidates += [
            _FLATTEN.replace("TEXT", text) + _BEFORE_OWN + own + _AFTER_OWN.replace("END", end)
            for text in (_MARKED_TEXT, _MARKED_TRIMMED_TEXT)
        ]
    return next(
        (found for found in candidates if _render_alike(tokenizer, flattened, found)), flattened
    )


def jinja_string(text: str) -> str:
    """Text as a string literal of Jinja."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """What a template writes after an assistant's text, up to white space: `</s>`, `<|im_end|>`."""
    turn = {"role": "assistant", "content": _PLACE}
    written = _render(tokenizer, template, [_QUESTION, turn], False) or ""
    return next(iter(written.rpartition(_PLACE)[2].split()), "")


def _render_alike(tokenizer: PreTrainedTokenizerBase, first: str, second: str) -> bool:
    return all(
        _render(tokenizer, first, sample, prompt) == _render(tokenizer, second, sample, prompt)
        for sample in _SAMPLES
        for prompt in (False, True)
    )


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, str]], prompt: bool
) -> Any:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except jinja2.TemplateError:  # a template may refuse a system turn
        return None
