"""What may be said of a DICOM file that cannot be read: nothing that an element of it holds."""

import re

_NAMES = (
    "AR AU BI BMD CR CT DG DX ECG EPS ES FID GM HC HD IO IVOCT IVUS KER KO LEN LS MG MR NM OAM "
    "OCT OP OPM OPT OPV OT PLAN PR PT PX REG RESP RF RG RTDOSE RTIMAGE RTPLAN RTRECORD RTSTRUCT "
    "SEG SM SMR SR ST TG US VA XA XC"
)
# Of all values in a file, only these are ever named in a message.
MODALITIES = frozenset(_NAMES.split())
_SIZES = re.compile(r"\(?(\d{1,12}) vs\.? (\d{1,12}) bytes")


class DicomError(ValueError):
    """Why a DICOM file gives no picture; the file is named, what it says of a patient never."""


def reason_without_values(error: BaseException) -> str:
    """The kind of an error of pydicom, and the sizes in it; its text may quote an element."""
    sizes = _SIZES.search(str(error))
    return f"{sizes[1]} vs {sizes[2]} bytes" if sizes else type(error).__name__


def modality_name(value: object) -> str:
    """A modality of the standard, or what else may be said of it."""
    if not value:
        return "no modality"
    return str(value) if value in MODALITIES else "another modality"
