"""`max serve` as a process of its own on the built-in model: what its clients see from its start to its end."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.slow

SMALL = ("--max-batch-size", "8", "--max-batch-input-tokens", "16", "--max-length", "256")
ROBOT: Any = [{"role": "user", "content": "robot"}]


@dataclass
class Server:
    """A running server; `log` is its stderr."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str

    def lines(self) -> list[dict[str, Any]]:
        """What it has logged, request lines among them."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def openai(self, **settings: Any) -> openai.OpenAI:
        defaults: dict[str, Any] = {"max_retries": 0, "_strict_response_validation": True}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **(defaults | settings))


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Starts a server that logs into `folder`."""
    command = [sys.executable, "-m", "max", "serve", "--port", "0", "--structured-logging", *arguments]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, cwd="/", stdout=subprocess.DEVNULL, stderr=log)


def running(folder: Path, *arguments: str) -> Iterator[Server]:
    """A server from its readiness to its end, which has to be a clean one."""
    process = start(folder, *arguments)
    try:
        yield wait_until_ready(process, folder / "log")
        process.terminate()
        assert process.wait(20) == 0, (folder / "log").read_text()
    finally:
        process.kill()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> Server:
    for _ in range(6000):
        for line in log.read_text().splitlines():
            if line.startswith("{") and (facts := json.loads(line))["message"] == "ready":
                return Server(process, log, facts["at"])
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    raise TimeoutError(log.read_text())


@pytest.fixture(scope="session")
def built_in_cache(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the built-in model with few buckets is warm."""
    folder = tmp_path_factory.mktemp("built-in") / "cache"
    done = run("warm-cache", *SMALL, "--cache-dir", str(folder))
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def arguments(built_in_cache: Path) -> tuple[str, ...]:
    return (*SMALL, "--cache-dir", str(built_in_cache))


@pytest.fixture(scope="module")
def server(built_in_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from running(tmp_path_factory.mktemp("server"), *SMALL, "--cache-dir", str(built_in_cache))


def test_the_openai_client_in_strict_mode(server: Server) -> None:
    client = server.openai()
    assert [model.id for model in client.models.list()] == ["built-in"]
    assert client.models.retrieve("built-in").id == "built-in"
    options: Any = {"model": "built-in", "messages": ROBOT, "temperature": 0, "max_tokens": 20}
    answer = client.chat.completions.create(**options)
    content = answer.choices[0].message.content
    assert content
    streamed = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(streamed)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == content
    assert chunks[-1].usage is not None and answer.usage is not None
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    told = client.chat.completions.create(**options, logprobs=True, top_logprobs=3).choices[0]
    assert told.message.content == content and told.logprobs is not None and told.logprobs.content
    for entry in told.logprobs.content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob), "greedy takes the likeliest"
    response = client.responses.create(model="built-in", input="robot", temperature=0, max_output_tokens=20)
    assert response.output_text == content
    completion = client.completions.create(model="built-in", prompt=["robot:", "sea"], max_tokens=4, n=2)
    assert len(completion.choices) == 4
    events = list(client.responses.create(model="built-in", input="robot", max_output_tokens=5, stream=True))
    assert events[-1].type in ("response.completed", "response.incomplete")


@pytest.mark.parametrize("fields", [{}, {"echo": True, "logprobs": 2}, {"n": 2}])
def test_completions_are_the_clients_type_but_for_two_nulls_of_the_api(server: Server, fields: dict[str, Any]) -> None:
    """`finish_reason` before the end of a stream, and the log-probability of a prompt's first token.

    The OpenAI API sends both; the client's type, which stands for chunks too, has neither.
    """
    body = {"prompt": "robot", "max_tokens": 5, "stream": True, "ignore_eos": True} | fields
    lines = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    reasons: dict[int, list[str | None]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            told = reasons.setdefault(choice["index"], [])
            if "echo" in fields and not told:
                assert choice["logprobs"]["token_logprobs"][0] is None is choice["logprobs"]["top_logprobs"][0]
                choice["logprobs"]["token_logprobs"][0], choice["logprobs"]["top_logprobs"][0] = 0.0, {}
            told.append(choice["finish_reason"])
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        openai.types.Completion.model_validate(chunk, strict=True)
    assert len(reasons) == fields.get("n", 1)
    assert all(told[-1] and set(told[:-1]) <= {None} for told in reasons.values())


def test_requests_that_cannot_be_answered(server: Server) -> None:
    client = server.openai()
    with pytest.raises(openai.BadRequestError, match="token id 8192"):
        client.completions.create(model="built-in", prompt=[8192])
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=ROBOT)
    assert httpx2.get(f"{server.url}/readyz").status_code == 200


def random_request(dice: random.Random) -> dict[str, Any]:
    """Options of a completion whose answer is the same every time: a seed, and perhaps stops and penalties."""
    words = ["robot", "sea", "naïve", "☃", "日本", "the whale", "a list of", "🤖"]
    options: dict[str, Any] = {
        "model": "built-in",
        "prompt": " ".join(dice.choices(words, k=dice.randint(1, 6))),
        "max_tokens": dice.randint(1, 24),
        "temperature": dice.choice([0, 0.7, 1.5]),
        "seed": dice.randint(-5, 10**6),
        "n": dice.choice([1, 1, 2]),
        "extra_body": {
            "ignore_eos": dice.random() < 0.3,
            "min_p": dice.choice([0, 0.05]),
            "top_k": dice.choice([0, 9]),
        },
    }
    if dice.random() < 0.5:
        options["stop"] = dice.sample([" of", "e", "an", "\n", " the", "or ", "s a"], k=dice.randint(1, 3))
    if dice.random() < 0.3:
        options |= {"presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"300": 3, "301": -100}}
    return options


def test_streamed_text_is_the_whole_text(server: Server) -> None:
    client = server.openai(_strict_response_validation=False)

    def agree(number: int) -> bool:
        options = random_request(random.Random(number))
        whole = client.completions.create(**options)
        texts: dict[int, str] = {}
        reasons: dict[int, str | None] = {}
        for chunk in client.completions.create(**options, stream=True):
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
        return [(choice.text, choice.finish_reason) for choice in whole.choices] == [
            (texts[index], reasons[index]) for index in sorted(texts)
        ]

    numbers = range(int(os.environ.get("RANDOM_REQUESTS", "100")))
    assert [number for number in numbers if not agree(number)] == []


def generate_arguments(options: dict[str, Any]) -> list[str]:
    """The same request for `max generate`, which knows no choices and no bias."""
    values = {
        "prompt": options["prompt"],
        "max-new-tokens": options["max_tokens"],
        "temperature": options["temperature"],
        "seed": options["seed"],
        "presence-penalty": options.get("presence_penalty", 0),
        "frequency-penalty": options.get("frequency_penalty", 0),
        "min-p": options["extra_body"]["min_p"],
        "top-k": options["extra_body"]["top_k"],
    }
    stops = [f"--stop={stop}" for stop in options.get("stop", [])]
    eos = ["--ignore-eos"] if options["extra_body"]["ignore_eos"] else []
    return [
        *(f"--{name}={value}" for name, value in values.items()),
        *stops,
        *eos,
        "--no-apply-chat-template",
        "--json",
    ]


def test_an_answer_is_the_same_however_it_is_asked_for(
    server: Server, arguments: tuple[str, ...], run: Callable[..., Any]
) -> None:
    """Alone, beside seven others, with and without pages from the prefix cache, and by `max generate`."""
    client = server.openai(_strict_response_validation=False, timeout=120)
    numbers = range(int(os.environ.get("RANDOM_REQUESTS", "100")))
    requests = {number: random_request(random.Random(-1 - number)) for number in numbers}
    for request in requests.values():
        request |= {"n": 1, "seed": abs(request["seed"])}
        request.pop("logit_bias", None)

    def answer(number: int) -> tuple[str, str]:
        (choice,) = client.completions.create(**requests[number]).choices
        return choice.text, choice.finish_reason

    def forgotten(number: int) -> tuple[str, str]:
        httpx2.post(f"{server.url}/reset_prefix_cache")
        return answer(number)

    alone = {number: forgotten(number) for number in numbers}
    assert [number for number in numbers if answer(number) != alone[number]] == []
    with ThreadPoolExecutor(8) as pool:
        beside = list(pool.map(answer, numbers))
    assert [number for number in numbers if beside[number] != alone[number]] == []
    for number in numbers[: int(os.environ.get("GENERATED_REQUESTS", "6"))]:
        done = run("generate", *arguments, *generate_arguments(requests[number]))
        generated = json.loads(done.out)
        assert (generated["text"], generated["finish_reason"]) == alone[number], requests[number]


def test_streams_at_once_get_what_each_gets_alone(server: Server) -> None:
    """Every client has a connection of its own, and all of them stream at the same time."""
    bodies: list[dict[str, Any]] = [
        {"prompt": f"{word} {seed}", "seed": seed, "max_tokens": 12, "ignore_eos": True, "stream": True}
        for word in ("robot", "日本", "🤖 whale", "naïve")
        for seed in range(6)
    ]

    def text_of(lines: list[str]) -> str:
        """The joined text of a stream that has ended well."""
        assert lines[-1] == "data: [DONE]", lines[-1]
        return "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1])

    async def ask(client: httpx2.AsyncClient, body: dict[str, Any]) -> str:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            return text_of([line async for line in answer.aiter_lines() if line])

    async def ask_all(count: int) -> tuple[list[str], list[str]]:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
            alone = [await ask(client, body) for body in bodies]
            asked = (ask(client, bodies[number % len(bodies)]) for number in range(count))
            return alone, list(await asyncio.gather(*asked))

    alone, together = asyncio.run(ask_all(int(os.environ.get("STREAMS", "100"))))
    assert [number for number, text in enumerate(together) if text != alone[number % len(bodies)]] == []
    assert len(set(alone)) > len(bodies) // 2


NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 8191, 8192, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, -0.0, 1e308, 5e-324,
    "", "a", "\x00", "\u202e", "0" * 5000, "x" * 200_000, [], [[]], [None], [-1], [8192], [2**40], [0.5], ["", 1], {},
    {"": {}}, {"a": [1]}, {"type": "text"}, [{"role": "user"}], [{"role": "user", "content": 1}],
    [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], list(range(3000)), ["a"] * 3000,
]  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "built-in", "messages": ROBOT, "max_tokens": 2},
    "/v1/completions": {"model": "built-in", "prompt": "robot", "max_tokens": 2},
    "/v1/responses": {"model": "built-in", "input": "robot", "max_output_tokens": 2},
    "/tokenize": {"prompt": "robot"},
    "/detokenize": {"tokens": [1, 2]},
}
FIELDS = [
    "messages", "prompt", "input", "tokens", "max_tokens", "max_completion_tokens", "max_output_tokens", "n",
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "logit_bias", "logprobs",
    "top_logprobs", "echo", "stream", "stream_options", "min_tokens", "ignore_eos", "cache_salt", "user",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "chat_template_kwargs", "tools", "response_format",
    "best_of", "suffix", "metadata", "instructions", "include", "text", "truncation", "vendor", "model",
]  # fmt: skip


def bad_body(dice: random.Random) -> tuple[str, bytes]:
    """A route and a body of which something is wrong, nearly always."""
    path = dice.choice(list(BODIES))
    if dice.random() < 0.1:
        return path, dice.randbytes(dice.choice([0, 1, 50, 5000]))
    body = {**BODIES[path], **{dice.choice(FIELDS): dice.choice(NASTY) for _ in range(dice.randint(1, 3))}}
    if dice.random() < 0.05:
        del body[dice.choice(list(body))]
    content = json.dumps(body).encode()
    match dice.randint(0, 30):
        case 0:
            return path, content[: dice.randrange(len(content))]
        case 1:
            return path, b'{"messages":' + b"[" * dice.choice([100, 1000, 100_000])
        case 2:
            return path, content.replace(b": 2", b": NaN").replace(b"robot", b"\xff\xfe")
        case 3:
            return path, content.replace(b"robot", b"\\ud800")
    return path, content


def test_bad_requests_are_the_clients_fault(server: Server) -> None:
    headers = {"content-type": "application/json"}
    counts: dict[int, int] = {}

    def send(numbers: range) -> None:
        with httpx2.Client(base_url=server.url, headers=headers, timeout=60) as client:
            for number in numbers:
                path, content = bad_body(random.Random(number))
                answer = client.post(path, content=content)
                assert answer.status_code < 500, (number, answer.text)
                if answer.status_code >= 400:
                    assert answer.json()["error"]["message"], number
                counts[answer.status_code] = counts.get(answer.status_code, 0) + 1

    total = int(os.environ.get("BAD_REQUESTS", "300"))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(send, [range(start, total, 4) for start in range(4)]))
    assert counts[400] > total / 2
    large = random.Random(0).randbytes(10_000_000)
    for path in BODIES:
        assert httpx2.post(server.url + path, content=large, headers=headers, timeout=60).status_code == 400
        quoted = b'{"prompt": "' + b"a" * 10_000_000 + b'"}'
        assert 200 <= httpx2.post(server.url + path, content=quoted, headers=headers, timeout=60).status_code < 500
    server.openai().chat.completions.create(model="built-in", messages=ROBOT, max_tokens=2)


def test_metrics_and_log_tell_of_what_was_done(server: Server) -> None:
    server.openai().chat.completions.create(model="built-in", messages=ROBOT, max_tokens=5, user="me")
    families = {
        family.name: family for family in text_string_to_metric_families(httpx2.get(f"{server.url}/metrics").text)
    }
    assert sum(sample.value for sample in families["maxserve_num_output_tokens"].samples) > 0
    assert families["maxserve_batch_size"].samples and families["maxserve_model_load_time_milliseconds"].samples
    hits = [(sample.labels, sample.value) for sample in families["maxserve_executable_cache_hits"].samples]
    assert hits == [({"kind": "exact"}, 1)]
    assert families["maxserve_executables_loaded"].samples[0].value > 0
    assert [line for line in server.lines() if line["message"] == "request" and line.get("user") == "me"]


def test_a_signal_lets_requests_finish(arguments: tuple[str, ...], tmp_path: Path) -> None:
    process = start(tmp_path, *arguments)
    try:
        server = wait_until_ready(process, tmp_path / "log")
        options: Any = {"model": "built-in", "prompt": "robot", "max_tokens": 240, "extra_body": {"ignore_eos": True}}
        stream = server.openai(_strict_response_validation=False).completions.create(**options, stream=True)
        first = next(iter(stream))
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert first.choices and rest[-1].choices[0].finish_reason == "length"
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_a_start_that_comes_to_nothing_leaves_no_folder(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start(tmp_path, *arguments, "--metrics-port", str(taken.getsockname()[1]))
        assert process.wait(60) == 2, (tmp_path / "log").read_text()
    assert list(temporary.iterdir()) == []
    process = start(tmp_path, *arguments)
    while not list(temporary.iterdir()):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM, "before it serves, the signal ends it"
    assert list(temporary.iterdir()) == []


def test_a_worker_that_is_killed_ends_its_streams_and_is_replaced(arguments: tuple[str, ...], tmp_path: Path) -> None:
    body = {"model": "built-in", "prompt": "robot", "max_tokens": 240, "ignore_eos": True, "stream": True}
    for server in running(tmp_path, *arguments):

        def read(url: str) -> str:
            return httpx2.post(f"{url}/v1/completions", json=body, timeout=60).text.strip().splitlines()[-1]

        (worker,) = children(server.process.pid, "max.serve.worker")
        with ThreadPoolExecutor(50) as pool:
            streams = [pool.submit(read, server.url) for _ in range(50)]
            time.sleep(0.3)
            os.kill(worker, signal.SIGKILL)
            ends = [stream.result() for stream in streams]
        assert all('"error":' in end or end == "data: [DONE]" for end in ends)
        assert sum('"error":' in end for end in ends) > 25
        client = server.openai(max_retries=20)
        assert client.chat.completions.create(model="built-in", messages=ROBOT).choices
        assert children(server.process.pid, "max.serve.worker") != [worker]


def test_several_api_processes_share_a_port(arguments: tuple[str, ...], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_port = free.getsockname()[1]
    options = ("--api-workers", "3", "--metrics-port", str(metrics_port), "--served-model-name", "org/dictionary")
    for server in running(tmp_path, *arguments, *options):
        deadline = time.monotonic() + 30
        while len(children(server.process.pid, "max.serve.api_worker")) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)

        def ask(url: str) -> int:
            body = {"model": "org/dictionary", "prompt": "robot", "max_tokens": 3}
            return httpx2.post(url, json=body, timeout=30).status_code

        with ThreadPoolExecutor(6) as pool:
            statuses = list(pool.map(ask, [f"{server.url}/v1/completions"] * 30))
        # A process that is not ready yet says so.
        assert set(statuses) <= {200, 503} and statuses.count(200) > 10
        text = httpx2.get(f"http://127.0.0.1:{metrics_port}/metrics").text
        counted = {
            sample.labels["code"]: sample.value
            for family in text_string_to_metric_families(text)
            if family.name == "maxserve_request_count"
            for sample in family.samples
            if sample.labels["path"] == "/v1/completions"
        }
        assert counted == {str(code): statuses.count(code) for code in set(statuses)}
        assert httpx2.get(f"http://127.0.0.1:{metrics_port}/v1/models").status_code == 404


def children(pid: int, module: str) -> list[int]:
    """The processes of this module that `pid` has started."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            if parent == pid and module in (entry.parent / "cmdline").read_text():
                found.append(int(entry.parent.name))
        except OSError:
            continue  # it has just ended
    return found


def test_a_full_queue_is_a_429_with_a_time(arguments: tuple[str, ...], tmp_path: Path) -> None:
    body = {"model": "built-in", "prompt": "robot", "max_tokens": 100, "ignore_eos": True}
    for server in running(tmp_path, *arguments, "--max-queue-size", "4"):

        def ask(url: str) -> httpx2.Response:
            return httpx2.post(f"{url}/v1/completions", json=body, timeout=60)

        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(ask, [server.url] * 40))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.status_code for answer in answers} == {200, 429}
        assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
        assert all(answer.json()["error"]["type"] == "rate_limit_error" for answer in refused)


def test_a_port_that_is_taken(run: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", "--port", str(taken.getsockname()[1]))
    assert done.code == 2 and "cannot listen on 127.0.0.1" in done.err and len(done.err.splitlines()) == 3


def test_a_model_that_is_not_there(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("serve", "--port", "0", "--model", str(tmp_path / "nothing"))
    assert done.code == 2 and "nothing" in done.err
    assert [line for line in done.err.splitlines() if line.startswith("error: ")]


def test_the_port_answers_while_the_model_loads(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # With nothing in the cache: a warm start can be over before the first probe.
    process = start(tmp_path, *SMALL, "--cache-dir", str(tmp_path / "cache"), "--port", str(port))
    seen: set[tuple[int, int]] = set()
    stop = threading.Event()

    def probe() -> None:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as client:
            while not stop.is_set():
                try:
                    seen.add((client.get("/health").status_code, client.get("/readyz").status_code))
                except httpx2.ConnectError:
                    time.sleep(0.01)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        wait_until_ready(process, tmp_path / "log")
        time.sleep(0.1)
    finally:
        stop.set()
        thread.join()
        process.terminate()
        process.wait(20)
    assert seen == {(200, 503), (200, 200)}
