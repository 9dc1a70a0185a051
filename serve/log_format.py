"""Log lines of a server: text for people, or one JSON object each."""

from __future__ import annotations

import logging
import time

import msgspec


class LineFormat(logging.Formatter):
    """Formats a record with its `facts`, which requests and starts carry, behind its message."""

    def __init__(self, *, structured: bool, prefix: str = "") -> None:
        super().__init__()
        self._structured, self._prefix = structured, prefix

    def format(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", {})
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        if self._structured:
            moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            content = {
                "time": f"{moment}.{int(record.msecs):03d}Z",
                "level": record.levelname.lower(),
                "logger": record.name,
                "message": self._prefix + record.getMessage(),
                **facts,
                **({"traceback": trace} if trace else {}),
            }
            return msgspec.json.encode(content, enc_hook=str).decode()
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        shown = "".join(f" {name}={_plain(value)}" for name, value in facts.items())
        line = f"{self._prefix}{moment}.{int(record.msecs):03d} {record.levelname} {record.getMessage()}{shown}"
        return f"{line}\n{trace}" if trace else line


def _plain(value: object) -> str:
    """A value that cannot break the line it stands in."""
    text = str(value)
    return text if text.isprintable() and " " not in text and text else msgspec.json.encode(text).decode()


def set_up(*, structured: bool, prefix: str, level: int | str | None = None) -> None:
    """Gives every handler of the root logger this format, and the package's logger a level."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(LineFormat(structured=structured, prefix=prefix))
    if level is not None:
        logging.getLogger(__name__.partition(".")[0]).setLevel(level)
