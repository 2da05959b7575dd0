"""What an error may say of a DICOM file."""

import pytest

from moellava.images.dicom_error import modality_name, reason_without_values


def test_an_error_is_its_kind_and_its_sizes():
    assert reason_without_values(ValueError("Doe^Jane has no pixels")) == "ValueError"
    error = ValueError("The number of bytes (512 vs. 1024 bytes) of Doe^Jane")
    assert reason_without_values(error) == "512 vs 1024 bytes"


@pytest.mark.parametrize(
    ("value", "name"),
    [("CT", "CT"), ("Doe^Jane", "another modality"), ("", "no modality"), (None, "no modality")],
)
def test_a_modality_of_the_standard_alone_is_said(value, name):
    assert modality_name(value) == name
