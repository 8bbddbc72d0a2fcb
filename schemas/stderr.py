"""What the interpreter itself writes to standard error, redacted: tracebacks, warnings, stray records."""

import logging
import sys
import threading
import traceback
import warnings

from schemas.redact import redact_text


class RedactedFormatter(logging.Formatter):
    """Formats a record of the standard library's, its traceback included."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_text(super().format(record))


def redact_stderr() -> None:
    """Sets the interpreter's hooks; call it at an entry point.

    Covers what nobody caught, in any thread and in `__del__`; warnings; and records of loggers without a handler,
    asyncio's among them.
    """
    sys.excepthook = lambda kind, error, trace: _write(error)
    threading.excepthook = lambda args: _write(args.exc_value, f"in {args.thread and args.thread.name}")
    sys.unraisablehook = lambda args: _write(args.exc_value, args.err_msg or f"ignored in {args.object!r}")
    warnings.formatwarning = _warning
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(RedactedFormatter())


def _write(error: BaseException | None, where: str = "") -> None:
    if error is None or isinstance(error, SystemExit):
        return
    text = "".join(traceback.format_exception(error))
    sys.stderr.write(redact_text(f"{where}\n{text}" if where else text))


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return redact_text(f"{filename}:{lineno}: {category.__name__}: {message}\n")
