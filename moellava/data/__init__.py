"""Datasets in, rows and batches out."""

from moellava.data.check import check_rows
from moellava.data.formats import FORMATS, Format, register_format
from moellava.data.layouts import Context
from moellava.data.readers import BadRow, Rows, read_rows
from moellava.data.rows import IMAGE_TOKEN, Row, RowError, Turn

__all__ = [
    "FORMATS",
    "IMAGE_TOKEN",
    "BadRow",
    "Context",
    "Format",
    "Row",
    "RowError",
    "Rows",
    "Turn",
    "check_rows",
    "read_rows",
    "register_format",
]
