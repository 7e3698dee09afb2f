"""What libraries say while they read, check or write a model."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

LOGGERS = ("transformers", "huggingface_hub", "peft", "torch", "safetensors")
# Of Python's warnings, those to programmers who call a library: which release of it will change what.
TO_PROGRAMMERS = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
MOST = 300  # characters of one message


class _Heard(logging.Handler):
    """Keeps messages, each once, on one line."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, None] = {}  # in their order

    def emit(self, record: logging.LogRecord) -> None:
        """See Handler."""
        self.keep(record.getMessage())

    def keep(self, message: str) -> None:
        """Take a message down."""
        line = " ".join(message.split())
        self.texts[line if len(line) <= MOST else f"{line[:MOST]}…"] = None


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from libraries; their settings are put back.

    Errors that they log and warnings to the person who runs them are more than advice: each is told once, in one line
    on stderr, whatever becomes of the work inside.
    """
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    heard = _Heard()
    for logger in loggers:
        logger.handlers, logger.propagate = [heard], False
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as warned:
            for kind in TO_PROGRAMMERS:
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
        for each in warned:
            heard.keep(str(each.message))
        for text in heard.texts:
            print(f"warning: the model's libraries say: {text}", file=sys.stderr)
