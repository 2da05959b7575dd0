"""Chat templates of other people, which are programs: what one may ask for before it is rendered.

Jinja's sandbox keeps a template from the machine's files, but bounds neither its loops nor its
texts. One that holds a large number, a product or a range is rendered first in a process of its
own, which has little time and memory.
"""

import functools
import json
import re
import subprocess
import sys

import jinja2
from jinja2 import nodes

from moellava.storage.limits import limit

_LARGE = 1000  # a number that a template has no use for, unless it counts or repeats
_REPEATING = ("range", "lipsum")
_WIDE = re.compile(r"%[^a-zA-Z%]*\d{4,}")  # a width of old formatting
# Tags of transformers, which mark what training learns from; they change no text.
_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_SECONDS = 10
# Rendered on two short turns. Standard library and Jinja only, so that it starts in 0.2 s.
_CHILD = """
import json, sys
from jinja2.sandbox import ImmutableSandboxedEnvironment
asked = json.load(sys.stdin)
try:
    import resource
except ImportError:  # Windows, where only the clock limits it
    pass
else:
    resource.setrlimit(resource.RLIMIT_AS, (asked["bytes"], asked["bytes"]))
    resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"], asked["seconds"]))
class Refused(Exception):
    pass
def refuse(message):
    raise Refused(message)
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
environment.globals.update(raise_exception=refuse, strftime_now=lambda form: form)
try:
    environment.from_string(asked["template"]).render(
        messages=[
            {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        ],
        tools=None, documents=None, add_generation_prompt=True, bos_token="<s>", eos_token="</s>",
    )
except MemoryError:
    sys.exit(3)
except BaseException:  # whoever renders it in earnest says what is wrong
    pass
"""


def require_bounded_template(template: str, where: object) -> None:
    """Raise `ValueError` if a chat template takes too much time or memory on two short turns.

    Args:
        where: what the template belongs to, for the message.
    """
    if not _is_bounded(template):
        raise ValueError(
            f"The chat template of {where} takes more than {_SECONDS} s or {limit('unpacked'):,} "
            "bytes for two short turns. If it is meant, set the environment variable "
            "MOELLAVA_MAX_UNPACKED to more bytes; else give another chat_template."
        )


@functools.lru_cache(maxsize=64)
def _is_bounded(template: str) -> bool:
    text = _MARKS.sub("", template)
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (jinja2.TemplateError, RecursionError):
        return True  # it cannot be rendered either
    if not any(map(_may_repeat, tree.find_all(nodes.Node))):
        return True
    asked = {"template": text, "bytes": limit("unpacked"), "seconds": _SECONDS}
    command = [sys.executable, "-I", "-c", _CHILD]
    try:
        subprocess.run(
            command,
            input=json.dumps(asked),
            text=True,
            capture_output=True,
            timeout=6 * _SECONDS,  # of the clock, on a busy machine
            check=True,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return False
    return True


def _may_repeat(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Mul | nodes.Pow):
        return True
    if isinstance(node, nodes.Name):
        return node.name in _REPEATING
    if not isinstance(node, nodes.Const):
        return False
    value: object = node.value
    is_large = isinstance(value, int | float) and abs(value) > _LARGE
    return is_large or (isinstance(value, str) and _WIDE.search(value) is not None)
