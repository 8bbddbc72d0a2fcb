"""Structured logs: one JSON object a line on standard error, redacted."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from schemas.redact import redact_value
from schemas.stderr import redact_stderr

Processor = structlog.typing.Processor


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor that lets no signature or credential through. Stands behind what renders tracebacks."""
    redacted: MutableMapping[str, Any] = redact_value(event)
    return redacted


def configure(level: int = logging.INFO) -> None:
    """Sends structlog's and the standard library's records one way."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        redact,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(ensure_ascii=False),
            ],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for ours in ("consumer", "schemas"):
        logging.getLogger(ours).setLevel(level)
    redact_stderr()
