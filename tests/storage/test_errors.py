"""Whatever a file holds, the error names it."""

import json
import pickle
import zlib

import jinja2
import pytest
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx
from safetensors import SafetensorError

from moellava.storage.errors import LFS_FIRST_LINE, reading, reason_of

POINTER = LFS_FIRST_LINE + b"\noid sha256:0123\nsize 345678901\n"


class PanicException(BaseException):
    """What pyo3 raises when Rust panics is called so, and is not an Exception."""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "x.dat").write_bytes(b"12345")
    return tmp_path / "x.dat"


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while deserializing header: header too large"),
        pickle.UnpicklingError("bad pickle here"),
        json.JSONDecodeError("Expecting value", "x", 0),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid start byte"),
        zlib.error("Error -3 while decompressing"),
        EOFError(),
        KeyError("weight_map"),
        RuntimeError("shape '[2]' is invalid for input of size 3"),
        RecursionError("maximum recursion depth exceeded"),
        OverflowError("too large"),
        AssertionError("not so"),
        MemoryError(),
        jinja2.TemplateSyntaxError("unexpected '}'", 1),
        yaml.YAMLError("could not parse it"),
        HFValidationError("Repo id must be so"),
        httpx.ReadTimeout("the read timed out"),
        PanicException("index out of bounds: the len is 3"),
        ValueError("a reason without the name"),
        TypeError("a reason without the name"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_becomes_one_that_names_the_file(file, error):
    message = r"x\.dat \(5 bytes\) cannot be read as a thing: "
    with pytest.raises(ValueError, match=message) as info, reading(file, "a thing"):
        raise error
    assert type(info.value) is ValueError
    assert info.value.__cause__ is error
    assert "\n" not in str(info.value)


def test_errors_that_callers_expect_and_that_name_the_file_pass(file):
    for error in (ValueError(f"{file} is odd"), TypeError(f"{file} is odd"), ImportError("no x")):
        with pytest.raises(type(error)) as info, reading(file):
            raise error
        assert info.value is error
    with pytest.raises(FileNotFoundError, match="gone"), reading(file.with_name("gone")):
        file.with_name("gone").open()
    with pytest.raises(OSError, match=r"x\.dat .*cannot be read: disk on fire"), reading(file):
        raise OSError("disk on fire")


def test_what_is_not_about_the_file_passes(file):
    class OutOfMemoryError(RuntimeError):
        """As torch's."""

    for error in (KeyboardInterrupt(), SystemExit(3), OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(type(error)) as info, reading(file):
            raise error
        assert info.value is error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b" \n<!DOCTYPE html><html>", "it is a web page; download the file itself"),
        (b"<html><body>Sign in", "it is a web page"),
        ("{}".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
    ],
)
def test_what_the_first_bytes_say_is_said(file, content, message):
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message), reading(file, "JSON"):
        json.loads(file.read_text())


def test_a_pointer_of_git_lfs_is_told_before_it_is_read(file):
    file.write_bytes(POINTER)
    with (
        pytest.raises(ValueError, match=r"x\.dat is a Git LFS pointer.*git lfs pull"),
        reading(file),
    ):
        pytest.fail("the block ran")


def test_a_pointer_in_a_folder_is_told_if_the_folder_cannot_be_read(file):
    file.with_name("tokenizer.model").write_bytes(POINTER)
    with reading(file.parent):
        pass  # it may be a file that nobody needs
    message = r"tokenizer\.model is a Git LFS pointer"
    with pytest.raises(ValueError, match=message), reading(file.parent):
        raise RuntimeError("Internal: could not parse ModelProto")


def test_reasons_are_one_short_line_without_advice():
    advice = (
        "Weights only load failed. Re-running `torch.load` with `weights_only` set to `False` will "
        "likely succeed...\n"
        "\tWeightsUnpickler error: Unsupported global: GLOBAL os.system was not allowed.\n"
    )
    assert reason_of(pickle.UnpicklingError(advice)).startswith(
        "UnpicklingError Unsupported global"
    )
    assert len(reason_of(ValueError("long " * 1000))) < 400
    assert reason_of(ValueError("two words\x1b[31m\nmore")) == "two words?[31m"
    assert reason_of(KeyError("x")) == "KeyError 'x'"
