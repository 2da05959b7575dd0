"""Records by byte offset, against the standard library reading the whole file."""

import json
import subprocess
import sys
import textwrap

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moellava.data import json_records
from moellava.data.json_records import JsonRecords
from moellava.data.rows import RowError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("json")


@settings(max_examples=100, deadline=None)
@example([None, [], -0.0], None, False, False)  # a window ends behind `-0.`
@example([12, 1e-30, 1e30], None, False, False)  # ... behind `1e` and `1e+`
@given(
    st.lists(VALUES, min_size=1, max_size=8),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.booleans(),
)
def test_records_equal_those_of_the_whole_list(folder, values, indent, ascii_only, with_mark):
    """Whatever the layout, and wherever the window of text ends (here every 7 bytes)."""
    path = folder / "a.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes((b"\xef\xbb\xbf" if with_mark else b"") + text.encode(errors="surrogatepass"))
    chunk, json_records._CHUNK = json_records._CHUNK, 7
    try:
        records = JsonRecords(path)
    finally:
        json_records._CHUNK = chunk
    assert list(records.scan()) == values == json.loads(text)
    assert [records[index] for index in range(-len(values), 0)] == values


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(), VALUES, min_size=1), min_size=1, max_size=6), st.booleans()
)
def test_records_equal_the_lines(folder, values, ends_in_newline):
    path = folder / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(value) for value in values) + "\n" * ends_in_newline)
    assert [JsonRecords(path)[index] for index in range(len(values))] == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": }]', r"broken JSON at byte 11, after 1 complete rows: Expecting value"),
        ('[{"a": 1}, {"a": "x', r"broken JSON at byte 11, after 1 complete rows"),
        ('[{"a": 1}', r"after 1 complete rows: the file ends in the middle"),
        ('[{"a": 1} {"a": 2}]', r"expected ',', found '{'"),
        (
            '{\n "data": [\n  {"a": 1}\n ]\n}',
            r"neither a JSON list of rows nor JSON lines.*list to a file of its own",
        ),
        ('[{"a": 1}] {"b": 2}', r"at byte 11, after 1 complete rows: '\{' follows the closing"),
        ("[]", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_a_file_that_is_broken_says_where(folder, text, message):
    path = folder / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"broken.json.*{message}"):
        JsonRecords(path)


def test_a_broken_line_is_an_error_of_its_own(folder):
    path = folder / "one.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    records = JsonRecords(path)
    assert (records[0], records[2]) == ({"a": 1}, {"a": 3})
    assert isinstance(list(records.scan())[1], RowError)
    with pytest.raises(RowError, match="it is not JSON"):
        records[1]


@pytest.mark.slow
def test_a_hundred_thousand_rows_open_in_bounded_memory_and_linear_time(tmp_path):
    """Measured in a fresh process: the peak of reading 50 MB stays below half of the file's size.

    The processor time is a small multiple of what the standard library's parser needs for the same
    file; work that grew with the square of the rows would be thousands of times more.
    """
    code = """
        import json, resource, sys, time
        from moellava.data import read_rows

        path = sys.argv[1]
        words = "the radiograph shows no acute finding " * 8
        with open(path, "w") as file:
            file.write("[")
            for index in range(100_000):
                asked = {"from": "human", "value": "<image>\\n" + words}
                turns = [asked, {"from": "gpt", "value": str(index)}]
                row = {"id": f"r{index}", "image": f"{index}.jpg", "conversations": turns}
                file.write(("," if index else "") + json.dumps(row))
            size = file.tell()
            file.write("]")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        rows = read_rows(path)
        ours = time.process_time() - start
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert (len(rows), rows[-1].answer) == (100_000, "99999")
        start = time.process_time()
        with open(path) as file:
            json.load(file)
        print(json.dumps([size, peak, ours / (time.process_time() - start)]))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "big.json")],
        check=True,
        capture_output=True,
        text=True,
    )
    size, peak, times_the_parser = json.loads(run.stdout)
    assert size > 40e6
    assert peak < size / 2
    assert times_the_parser < 100
