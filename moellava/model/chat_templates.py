"""Chat templates whose messages hold text and images; assistant turns carry the marks that training masks need."""

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
    "{%- if messages[0]['role'] != 'system' -%}{{ '" + _VICUNA_SYSTEM.replace("'", "\\'") + " ' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ text_of(message['content']) + ' ' }}"
    "{%- elif message['role'] == 'user' -%}{{ 'USER: ' + text_of(message['content']) + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' }}"
    "{%- generation -%}{{ text_of(message['content']) + eos_token }}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)

# ChatML, the format of SmolLM2 and many others; without their default system turns.
CHATML = _CONTENT + (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ text_of(message['content']) + '<|im_end|>' }}{%- endgeneration -%}"
    "{%- else -%}{{ text_of(message['content']) + '<|im_end|>' }}{%- endif -%}"
    "{{ '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

# LLaVA's first stage: the image, its caption, a newline; the words of the request are left out.
PLAIN = _CONTENT + (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ text_of(message['content']) + '\n' }}{%- endgeneration -%}"
    "{%- elif message['content'] is not string -%}"
    "{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

# Flattens the messages, then hands them to the language model's own template; it has no marks for training.
_FLATTEN = _CONTENT + (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=text_of(message['content']))] -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)

TEMPLATES = {"tinyllama": TINYLLAMA, "vicuna_v1": VICUNA_V1, "chatml": CHATML, "plain": PLAIN}

_SAMPLE = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "r"},
]
_SAMPLES = (_SAMPLE, _SAMPLE[1:])  # many templates write a system turn of their own where none is given


def multimodal_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for a language model: its own format, with images.

    A model whose own template writes the same text as one of `TEMPLATES` gets that one, which can mark
    assistant turns for training; any other template is kept, behind a preamble that turns images into
    `<image>`; a model without a template (a base model) gets `vicuna_v1`, LLaVA's.
    """
    own = tokenizer.chat_template
    if own is None:
        return VICUNA_V1
    for template in TEMPLATES.values():
        if _renders_alike(tokenizer, own, template):
            return template
    return _FLATTEN + own


def _renders_alike(tokenizer: PreTrainedTokenizerBase, own: str, template: str) -> bool:
    def render(text: str, sample: list[dict[str, str]]) -> str | None:
        try:
            return str(
                tokenizer.apply_chat_template(sample, chat_template=text, tokenize=False, add_generation_prompt=True)
            )
        except jinja2.TemplateError:  # a template may refuse a system turn
            return None

    return all(render(own, sample) == render(template, sample) for sample in _SAMPLES)
