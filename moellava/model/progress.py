"""Progress bars while weights are read: `progress_bars`."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """transformers' switch, set for a while; it turns huggingface_hub's download bars too, so those are set back."""
    was_shown, downloads_shown = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    _switch(shown, downloads_shown)
    try:
        yield
    finally:
        _switch(was_shown, downloads_shown)


def _switch(shown: bool, downloads_shown: bool) -> None:
    (transformers_logging.enable_progress_bar if shown else transformers_logging.disable_progress_bar)()
    (enable_progress_bars if downloads_shown else disable_progress_bars)()
