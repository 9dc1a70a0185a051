"""A request has an id and one line in the log, in either format, that nothing a client sends can break."""

from __future__ import annotations

import json
import logging

import httpx2
import pytest

from max.serve.log_format import LineFormat

pytestmark = pytest.mark.anyio
BODY = {"model": "org/echo", "prompt": "a robot", "max_tokens": 2, "temperature": 0, "user": "somebody else"}


async def test_ids_are_taken_or_made(client: httpx2.AsyncClient) -> None:
    given = await client.get("/health", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    ids = {(await client.get("/health", headers=headers)).headers["x-request-id"]
           for headers in ({}, {}, {"x-request-id": "a b"}, {"x-request-id": "x" * 129})}  # fmt: skip
    assert len(ids) == 4 and all(made.startswith("req_") for made in ids)


async def test_one_line_tells_of_a_request(client: httpx2.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "max")
    await client.post("/v1/completions", json=BODY, headers={"x-request-id": "abc"})
    await client.get("/health")
    (record,) = [record for record in caplog.records if record.name == "max.serve.request_log"]
    facts = record.__dict__["facts"]
    assert facts.pop("ms") > 0
    expected = {"id": "abc", "method": "POST", "path": "/v1/completions", "status": 200, "user": "somebody else"}
    assert facts == expected | {"prompt_tokens": facts["prompt_tokens"], "completion_tokens": 2}
    line = LineFormat(structured=False, prefix="[a] ").format(record)
    assert line.startswith("[a] ") and line.count("\n") == 0 and 'user="somebody else"' in line
    whole = json.loads(LineFormat(structured=True).format(record))
    assert whole["status"] == 200 and whole["level"] == "info" and whole["message"] == "request" and whole["time"]


def test_no_value_breaks_a_line() -> None:
    record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "facts": {"user": "a\nERROR b=\x1b[31m"}})
    assert "\n" not in LineFormat(structured=False).format(record)
    assert "\x1b" not in LineFormat(structured=False).format(record)
    assert "\n" not in LineFormat(structured=True).format(record)


def test_a_traceback_is_kept() -> None:
    try:
        raise ValueError("why")
    except ValueError as error:
        record = logging.makeLogRecord({"msg": "failed", "exc_info": (type(error), error, error.__traceback__)})
    assert "ValueError: why" in LineFormat(structured=False).format(record)
    assert "ValueError: why" in json.loads(LineFormat(structured=True).format(record))["traceback"]
