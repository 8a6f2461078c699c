"""How log records look on stderr: one line of text or of JSON each, whatever is in them."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal, get_args

from aiohttp.http import HttpProcessingError
from aiohttp.web import RequestPayloadError

Form = Literal["text", "json"]
FORMS: tuple[Form, ...] = get_args(Form)
Fields = dict[str, str | int | float]


def start(form: Form = "text", level: int = logging.WARNING) -> None:
    """Sends records to stderr, of this project from `level` on, of others from WARNING on."""
    to = logging.StreamHandler()
    to.setFormatter(AsJson() if form == "json" else AsText())
    to.addFilter(_not_of_strangers)
    logging.basicConfig(level=logging.WARNING, handlers=[to])
    logging.getLogger("edge_server").setLevel(level)


def say(log: logging.Logger, event: str, fields: Fields) -> None:
    """One line at INFO: what happened, and numbers and short names of it."""
    log.info(event, extra={"fields": fields})


def _not_of_strangers(record: logging.LogRecord) -> bool:
    """aiohttp logs a traceback and the bytes that came, maybe a token, for all that is not HTTP: anybody could fill the disk."""
    return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError | RequestPayloadError)


class AsText(logging.Formatter):
    """For people. What goes on beyond its first line is indented, so nothing that was sent can look like a record."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        message = f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}{fields}"
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        rows = [*message.splitlines(), *trace.splitlines()]
        return "\n    ".join(row if row.isprintable() else "".join(c if c.isprintable() else "?" for c in row) for row in rows)


class AsJson(logging.Formatter):
    """For programs: `time`, `level`, `event` and the fields; `trace` where something failed."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname, "logger": record.name, "event": record.getMessage()}
        trace = {"trace": self.formatException(record.exc_info)} if record.exc_info else {}
        return json.dumps({**line, **_fields(record), **trace})


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _fields(record: logging.LogRecord) -> Fields:
    found: Fields = getattr(record, "fields", {})
    return found
