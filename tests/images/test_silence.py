"""What the libraries that read images may say."""

import logging
import warnings

import pytest

from moellava.images.silence import reason_without_quotes, silent_libraries


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bad header 'Doe^Jane' here", "bad header '...' here"),
        ('unknown magic b"Doe^Jane"', "unknown magic '...'"),
        ("cut off in b'Doe^Ja", "cut off in '...'"),
        ("12 of 20 bytes", "12 of 20 bytes"),
    ],
)
def test_what_an_error_quotes_is_left_out(text, said):
    assert said in reason_without_quotes(ValueError(text))
    assert "Doe" not in reason_without_quotes(ValueError(text))


def test_the_libraries_are_silent_inside_and_heard_outside(caplog):
    logger = logging.getLogger("pydicom")
    with silent_libraries():
        logger.error("Doe^Jane")
    assert not caplog.records
    logger.error("heard")
    assert [record.getMessage() for record in caplog.records] == ["heard"]


def test_their_warnings_are_left_out():
    with warnings.catch_warnings(record=True) as caught, silent_libraries():
        warnings.warn_explicit("Doe^Jane", UserWarning, "x.py", 1, module="pydicom.values")
        warnings.warn_explicit("heard", UserWarning, "x.py", 1, module="moellava.images")
    assert [str(one.message) for one in caught] == ["heard"]
