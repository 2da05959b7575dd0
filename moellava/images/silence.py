"""What the libraries that read images may say: nothing, since their texts quote the files."""

import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from moellava.storage.errors import reason_of

# pydicom's warnings and errors quote elements; Pillow's log has the text of TIFF tags at its level
# DEBUG.
_LOGGERS = (
    *("pydicom", "pydicom.pixels.decoders.base", "pydicom.pixels.utils"),
    *("pylibjpeg", "pylibjpeg.utils", "openjpeg", "openjpeg.utils", "jpeg_ls"),
    *("PIL.ImageFile", "PIL.PngImagePlugin", "PIL.TiffImagePlugin"),
    "nibabel.global",
)
_DECODERS = r"(pydicom|pylibjpeg|openjpeg|libjpeg|jpeg_ls|rle)(\.|$)"
_QUOTED = re.compile(r"""b?'[^']*'?|b?"[^"]*"?""")
_quiet = threading.local()


@contextmanager
def silent_libraries() -> Iterator[None]:
    """Leave out warnings and log records of the libraries that read images, in this thread."""
    # Set anew each time, since callers may reset filters; a context of `warnings` is not for
    # threads.
    warnings.filterwarnings("ignore", module=_DECODERS)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL(\.|$)")
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if _drop_if_quiet not in logger.filters:
            logger.addFilter(_drop_if_quiet)
    before, _quiet.is_on = getattr(_quiet, "is_on", False), True
    try:
        yield
    finally:
        _quiet.is_on = before


def reason_without_quotes(error: BaseException) -> str:
    """The reason of an error of Pillow or nibabel, without what it quotes from the file."""
    return _QUOTED.sub("'...'", reason_of(error))


def _drop_if_quiet(record: logging.LogRecord) -> bool:
    return not getattr(_quiet, "is_on", False)
