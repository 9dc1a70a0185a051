"""The page at / in a real browser: what it shows, and a conversation in it. Needs chromium."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]


# The browser takes its commands from descriptor 3 and answers on 4.
_AS_3_AND_4 = (
    "import fcntl, os, sys; "
    "there, back = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 20) for number in sys.argv[1:3]); "
    "os.dup2(there, 3); os.dup2(back, 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """A headless browser, driven over the two pipes of the DevTools protocol: messages end with a zero byte."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        there, self._to = os.pipe()
        self._from, back = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command = [sys.executable, "-c", _AS_3_AND_4, str(there), str(back), CHROMIUM, *flags]
        command += [f"--user-data-dir={profile}", "about:blank"]
        silent = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(there, back), stdout=silent, stderr=silent)
        os.close(there)
        os.close(back)
        self._rest, self._number, self._session = b"", 0, ""
        self.complaints: list[str] = []
        """Errors of scripts, and what the content policy refused."""

    def open(self, url: str) -> None:
        """Opens a page and goes on with it."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=url)

    def call(self, method: str, **params: Any) -> Any:
        """Sends a command and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            if answer.get("method") == "Runtime.exceptionThrown" or (
                answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error"
            ):
                self.complaints.append(json.dumps(answer["params"]))
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            received = os.read(self._from, 1 << 16)
            assert received, "the browser has ended"
            self._rest += received
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The expression's value, as soon as it is true."""
        for _ in range(400):
            if value := self.value(expression):
                return value
            time.sleep(0.05)
        raise TimeoutError(f"{expression}\n{self.value('document.body.innerText')}\n{self.complaints}")

    def close(self) -> None:
        os.close(self._to)
        os.close(self._from)
        self._process.kill()
        self._process.wait()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    made = Browser(tmp_path / "profile")
    yield made
    made.close()


@pytest.fixture
def echo() -> Iterator[str]:
    """The URL of a server over an engine that answers with the prompt, slowly enough to be watched."""
    found = importlib.util.find_spec("max.models.builtin")
    assert found is not None and found.origin is not None
    command = [sys.executable, "-m", "max.serve.echo_engine", str(Path(found.origin).parent), "0", "0.02"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd="/") as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.terminate()


def say(browser: Browser, text: str) -> None:
    browser.value(f"document.getElementById('prompt').value = {json.dumps(text)}")
    browser.value("document.getElementById('send').click()")


def test_the_page_shows_the_server_and_chats(browser: Browser, echo: str) -> None:
    browser.open(echo)
    browser.wait_for("document.getElementById('state').textContent === 'ready'")
    assert browser.value("document.getElementById('model').textContent") == "echo"
    assert "cache" in browser.value("document.getElementById('start').innerText")
    assert "1,024 tokens" in browser.value("document.getElementById('facts').innerText")
    browser.value("document.getElementById('temperature').value = 0")
    hostile = '<img src=x onerror="document.title=1"> robot'
    say(browser, hostile)
    browser.wait_for("document.querySelector('.message.assistant small') !== null")
    assert browser.value("document.querySelector('.message.user').textContent") == hostile
    shown = browser.value("document.querySelector('.message.assistant').firstChild.textContent")
    body = {"model": "echo", "messages": [{"role": "user", "content": hostile}], "temperature": 0}
    answer = httpx2.post(f"{echo}/v1/chat/completions", json=body).json()
    assert shown == answer["choices"][0]["message"]["content"] and "<img" in shown
    assert browser.value("document.querySelectorAll('.message img').length") == 0
    assert "tokens per second" in browser.value("document.querySelector('.message small').textContent")
    assert browser.wait_for("document.getElementById('line').getAttribute('d')")
    assert not browser.complaints


def test_an_answer_can_be_stopped(browser: Browser, echo: str) -> None:
    browser.open(echo)
    browser.wait_for("document.getElementById('send').disabled === false")
    browser.value("document.getElementById('temperature').value = 0")
    say(browser, "a robot of the sea " * 30)
    browser.wait_for("document.querySelector('.message.assistant')?.textContent.length > 5")
    browser.value("document.getElementById('stop').click()")
    browser.wait_for("document.getElementById('stop').disabled")
    metrics = httpx2.get(f"{echo}/metrics").text
    assert 'maxserve_request_count_total{code="499",path="/v1/chat/completions"} 1.0' in metrics
    assert not browser.complaints


def test_an_error_is_shown(browser: Browser, echo: str) -> None:
    browser.open(echo)
    browser.wait_for("document.getElementById('send').disabled === false")
    say(browser, "robot " * 3000)
    assert "too long" in browser.wait_for("document.querySelector('.message.error')?.textContent")


def test_the_api_is_described(browser: Browser, echo: str) -> None:
    browser.open(f"{echo}/docs")
    browser.wait_for("document.querySelectorAll('details').length > 10")
    text = browser.value("document.getElementById('routes').textContent")
    assert "/v1/chat/completions" in text and "repetition_penalty" in text
    assert not browser.complaints


def test_nothing_comes_from_elsewhere(echo: str) -> None:
    for path in ("/", "/docs", "/static/page.js", "/static/docs.js", "/static/page.css", "/static/icon.svg"):
        answer = httpx2.get(echo + path)
        assert answer.status_code == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
        assert not {"http://", "https://", "//cdn"} & {
            word
            for word in ("http://", "https://", "//cdn")
            if word in answer.text.replace("http://www.w3.org/2000/svg", "")
        }
