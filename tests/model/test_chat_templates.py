import pytest

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
    chat = [{"role": role, "content": f" {role} text "} for role in ("system", "user", "assistant", "user")]
    own = render(tokenizer, tokenizer.chat_template, chat, add_generation_prompt=True)
    assert multimodal_chat_template(tokenizer) == TEMPLATES["tinyllama"]
    assert render(tokenizer, TEMPLATES["tinyllama"], chat, add_generation_prompt=True) == own


def test_an_image_stands_on_its_own_line(tokenizer):
    assert render(tokenizer, TEMPLATES["tinyllama"]) == "<|user|>\n<image>\nWhat is it?</s>\n<|assistant|>\nA CT.</s>\n"


def test_a_base_model_gets_vicunas_format(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert multimodal_chat_template(tokenizer) == TEMPLATES["vicuna_v1"]
    text = render(tokenizer, TEMPLATES["vicuna_v1"])
    assert text.startswith("A chat between a curious user and an artificial intelligence assistant. ")
    assert text.endswith("questions. USER: <image>\nWhat is it? ASSISTANT: A CT.</s>")


def test_another_models_template_is_kept_and_takes_images(tokenizer, monkeypatch):
    chatml = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", chatml)
    text = render(tokenizer, multimodal_chat_template(tokenizer))
    assert text == "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA CT.<|im_end|>\n"


def test_chatml_gets_the_marks_that_training_needs(tokenizer, monkeypatch):
    chatml = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", chatml)
    assert multimodal_chat_template(tokenizer) == TEMPLATES["chatml"]
    # One that writes a system turn of its own is another format.
    with_system = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHi<|im_end|>\n' }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", with_system + chatml)
    assert multimodal_chat_template(tokenizer).endswith(chatml)
