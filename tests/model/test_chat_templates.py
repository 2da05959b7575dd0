from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from moellava.model.builder_enhanced import load_tokenizer
from moellava.model.chat_templates import TEMPLATES, multimodal_chat_template
from moellava.testing import TINYLLAMA

CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A CT."},
]


@pytest.fixture(scope="module")
def tokenizer(hub_cache):
    return load_tokenizer(TINYLLAMA)


def render(tokenizer, template, chat=CHAT, **options):
    return tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **options)


def test_a_text_chat_is_what_tinyllamas_own_template_writes(tokenizer):
    chat = [
        {"role": role, "content": f" {role} text "}
        for role in ("system", "user", "assistant", "user")
    ]
    own = render(tokenizer, tokenizer.chat_template, chat, add_generation_prompt=True)
    assert multimodal_chat_template(tokenizer) == "{{- bos_token -}}" + TEMPLATES["tinyllama"]
    assert render(tokenizer, TEMPLATES["tinyllama"], chat, add_generation_prompt=True) == own


def test_an_image_stands_on_its_own_line(tokenizer):
    assert (
        render(tokenizer, TEMPLATES["tinyllama"])
        == "<|user|>\n<image>\nWhat is it?</s>\n<|assistant|>\nA CT.</s>\n"
    )


def test_a_base_model_gets_vicunas_format(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert multimodal_chat_template(tokenizer) == "{{- bos_token -}}" + TEMPLATES["vicuna_v1"]
    text = render(tokenizer, TEMPLATES["vicuna_v1"])
    assert text.startswith(
        "A chat between a curious user and an artificial intelligence assistant. "
    )
    assert text.endswith("questions. USER: <image>\nWhat is it? ASSISTANT: A CT.</s>")


def spans(tokenizer, template, chat):
    """The whole text and the parts of it that are marked as the assistant's."""
    options = {"return_assistant_tokens_mask": True, **tokenizer.special_tokens_map}
    (text,), (indices,) = render_jinja_template(
        conversations=[chat], chat_template=template, **options
    )
    return text, [text[start:end] for start, end in indices]


def own_template(name):
    if name in OWN_TEMPLATES:
        return OWN_TEMPLATES[name]
    trl = pytest.importorskip("trl")  # keeps copies of the published templates
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def with_bos(text):
    """What a template of ours writes for a tokenizer that writes <s> itself, as TinyLlama's."""
    return text if text.startswith("<s>") else "<s>" + text


SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
    "Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif "
    "%}{% endfor %}"
)
OWN_TEMPLATES = {"smollm2": SMOLLM2, "mistral": MISTRAL}
ENDS = {
    "smollm2": "<|im_end|>", "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "mistral": "</s>",
    "phi3": "<|end|>",
    "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "llama3_2": "<|eot_id|>",
    "gemma": "<end_of_turn>",
}  # fmt: skip
TALK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A CT."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": [{"type": "text", "text": "Yes, it is."}]},
]
FLAT_TALK = [
    {"role": "user", "content": "<image>\nWhat is it?"},
    {"role": "assistant", "content": "A CT."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes, it is."},
]


@pytest.mark.parametrize("name", ENDS)
def test_another_models_template_is_kept_takes_images_and_gets_marks(tokenizer, monkeypatch, name):
    own = own_template(name)
    monkeypatch.setattr(tokenizer, "chat_template", own)
    text, marked = spans(tokenizer, multimodal_chat_template(tokenizer), TALK)
    assert text == with_bos(render(tokenizer, own, FLAT_TALK))
    assert marked == ["A CT." + ENDS[name], "Yes, it is." + ENDS[name]]


@pytest.mark.parametrize("name", ["llama3", "cohere", "gemma", "qwen2_5_vl"])
def test_the_marks_are_those_of_trls_training_templates(tokenizer, monkeypatch, name):
    monkeypatch.setattr(tokenizer, "chat_template", own_template(name))
    chat = [message | {"content": str(index)} for index, message in enumerate(FLAT_TALK)]
    _, ours = spans(tokenizer, multimodal_chat_template(tokenizer), chat)
    _, theirs = spans(tokenizer, own_template(f"{name}_training"), chat)
    assert ours == [
        span.rstrip("\n") for span in theirs
    ]  # some also mark the line feed behind the turn's end


def test_a_template_that_takes_answers_apart_is_kept_without_marks(tokenizer, monkeypatch):
    own = "{% for m in messages %}{{ m['role'] + ': ' + m['content'][:4] }}{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", own)
    text, marked = spans(tokenizer, multimodal_chat_template(tokenizer), TALK)
    assert text == with_bos(render(tokenizer, own, FLAT_TALK))
    assert marked == []


def test_a_template_with_marks_of_its_own_keeps_them(tokenizer, monkeypatch):
    own = TEMPLATES["tinyllama"].replace("<|", "<||")
    monkeypatch.setattr(tokenizer, "chat_template", own)
    assert spans(tokenizer, multimodal_chat_template(tokenizer), TALK)[1] == [
        "A CT.</s>",
        "Yes, it is.</s>",
    ]


@pytest.mark.parametrize(
    ("own", "end"),
    [
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + "
            "m['content'].strip() "
            "+ ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}"
            "{% endfor %}",
            " </s>",
        ),
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ '### Q:\n' + "
            "m['content'] + '\n' }}"
            "{% else %}{{ '### A:\n' + m['content'] + '\n<|EOT|>\n' }}{% endif %}{% endfor %}",
            "\n<|EOT|>",
        ),
    ],
    ids=["llama2", "deepseek"],
)
def test_the_end_of_a_turn_is_learned_with_white_space_before_it(tokenizer, monkeypatch, own, end):
    monkeypatch.setattr(tokenizer, "chat_template", own)
    text, marked = spans(tokenizer, multimodal_chat_template(tokenizer), TALK)
    assert text == with_bos(render(tokenizer, own, FLAT_TALK))
    assert marked == ["A CT." + end, "Yes, it is." + end]


def test_a_template_that_writes_the_beginning_gets_no_second_one(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", MISTRAL)
    assert render(tokenizer, multimodal_chat_template(tokenizer), TALK).count("<s>") == 1


def test_of_named_templates_the_default_counts(tokenizer, monkeypatch):
    named = {"tool_use": "{{ raise_exception('tools only') }}", "default": SMOLLM2}
    monkeypatch.setattr(tokenizer, "chat_template", named)
    text = render(tokenizer, multimodal_chat_template(tokenizer), TALK)
    assert text == with_bos(render(tokenizer, SMOLLM2, FLAT_TALK))
    monkeypatch.setattr(tokenizer, "chat_template", {"tool_use": SMOLLM2})
    with pytest.raises(ValueError, match="templates tool_use, but none is called 'default'"):
        multimodal_chat_template(tokenizer)


@pytest.mark.parametrize("place", ["user", "assistant"])
@pytest.mark.parametrize("odd", ["\x02", "\x03", "a\x03b\x02c\x03d", "\x02\x033\x02"])
def test_control_characters_survive_in_any_text(tokenizer, monkeypatch, place, odd):
    monkeypatch.setattr(tokenizer, "chat_template", SMOLLM2)
    question, answer = ("q" + odd, "a") if place == "user" else ("q", "a" + odd)
    chat = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": question},
    ]
    text, marked = spans(tokenizer, multimodal_chat_template(tokenizer), chat)
    assert text == with_bos(render(tokenizer, SMOLLM2, chat))
    assert marked == [answer + "<|im_end|>"]


def test_control_characters_in_a_question_do_no_harm(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", SMOLLM2)
    chat = [{"role": "user", "content": "a\x02b"}, {"role": "assistant", "content": "c"}]
    text, marked = spans(tokenizer, multimodal_chat_template(tokenizer), chat)
    assert "a\x02b<|im_end|>" in text
    assert marked == ["c<|im_end|>"]


def test_plain_is_llavas_first_stage(tokenizer):
    text, marked = spans(tokenizer, TEMPLATES["plain"], TALK[:2])
    assert text == "<image>A CT.\n"  # LLaVA's conv_plain: the image, the caption, its separator
    assert marked == ["A CT.\n"]
