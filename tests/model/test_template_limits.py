"""What a chat template of another's may ask for."""

import subprocess

import pytest

from moellava.model.chat_templates import TEMPLATES
from moellava.model.template_limits import require_bounded_template

LOOP = "{% for i in range(99999) %}"
BOMBS = {
    "nested loops": LOOP * 3 + "x" + "{% endfor %}" * 3,
    "a macro in a loop": (
        "{% macro m() %}" + LOOP + "x{% endfor %}{% endmacro %}" + LOOP * 2 + "{{ m() }}"
        "{% endfor %}{% endfor %}"
    ),
    "a text that doubles": (
        "{% set ns = namespace(s='a') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}"
    ),
    "a product": "{{ 'a' * 99999999999 }}",
    "a width": "{{ '%099999999999d' % 1 }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_grows_without_end_is_refused(monkeypatch, name):
    monkeypatch.setattr("moellava.model.template_limits._SECONDS", 1)
    with pytest.raises(ValueError, match=r"chat template of org/name takes more than 1 s"):
        require_bounded_template(BOMBS[name], "org/name")


@pytest.mark.parametrize(
    "template",
    [
        *TEMPLATES.values(),
        "{% for message in messages %}{{ message['content'] }}{% endfor %}",
        "{{ broken",
    ],
)
def test_other_templates_cost_no_process(monkeypatch, template):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a process was started"))
    require_bounded_template(template, "org/name")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(messages | length) %}{{ messages[i]['content'] }}{% endfor %}",
        "{{ raise_exception('2048') if messages | length > 2048 else 'a' * 3 }}",
        "{{ raise_exception('no') if range(3) }}",
    ],
)
def test_small_counts_are_rendered_and_accepted(template):
    require_bounded_template(template, "org/name")


def test_a_processor_and_a_builder_refuse_it(hub_cache, tmp_path):
    from transformers import AutoTokenizer

    from moellava.model.chat_templates import multimodal_chat_template
    from moellava.model.processing_moellava import MoeLlavaProcessor
    from moellava.testing import TINYLLAMA

    tokenizer = AutoTokenizer.from_pretrained(TINYLLAMA)
    tokenizer.add_tokens(["<image>"])
    bomb = BOMBS["a product"]
    for template in (bomb, {"default": "a", "other": bomb}):
        with pytest.raises(ValueError, match=f"chat template of {TINYLLAMA} takes more"):
            MoeLlavaProcessor(None, tokenizer, chat_template=template)
    for template in (bomb, {"default": bomb}):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=f"chat template of {TINYLLAMA} takes more"):
            multimodal_chat_template(tokenizer)
