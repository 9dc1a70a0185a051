"""Log-probabilities of prompts over HTTP, as an evaluation asks for them, against what transformers answered."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from seeded import seeded_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
NAME = "mha_default"
CONFIG = json.loads((HERE / "llama.json").read_text())[NAME]
# Of the standard deviation of the logits, as in test_llama_dense.py.
TOLERANCE = 1e-4
TOP = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the references; its tokenizer has a token for each byte."""
    folder = tmp_path_factory.mktemp(NAME)
    seeded_checkpoint(CONFIG, folder)
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={name: id for id, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def client(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """Of a server whose steps are shorter than the prompts."""
    folder = tmp_path_factory.mktemp("server")
    limits = ("--max-batch-size", "4", "--max-batch-input-tokens", "16", "--max-length", "64")
    command = [sys.executable, "-m", "max", "serve", "--model", str(checkpoint), "--port", "0", "--structured-logging"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, *limits, "--cache-dir", str(folder / "cache")], stderr=log)
    try:
        with httpx2.Client(base_url=_url(process, folder / "log"), timeout=60) as client:
            yield client
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(6000):
        for line in log.read_text().splitlines():
            if line.startswith("{") and (facts := json.loads(line))["message"] == "ready":
                return facts["at"]
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    raise TimeoutError(log.read_text())


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    """The prompt, and the log-probabilities (40, V) behind each of its tokens."""
    with np.load(HERE / "references" / f"llama_{NAME}.npz") as arrays:
        logits = arrays["logits"].astype(np.float64)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        logprobs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        return {"prompt": arrays["prompt"], "greedy": arrays["greedy"], "logprobs": logprobs, "std": logits.std()}


@pytest.mark.parametrize(("max_tokens", "stream"), [(0, False), (1, False), (1, True)])
def test_an_echoed_prompt_is_as_likely_as_transformers_says(
    client: httpx2.Client, reference: dict[str, Any], max_tokens: int, stream: bool
) -> None:
    prompt, wanted = reference["prompt"].tolist(), reference["logprobs"]
    # The second prompt ends earlier: it shares pages and steps with the first, and a cut changes nothing before it.
    prompts = [prompt, prompt[:23]]
    body = {"prompt": prompts, "max_tokens": max_tokens, "echo": True, "logprobs": TOP, "temperature": 0}
    told = _logprobs(client, body | {"ignore_eos": True, "stream": stream})
    tolerance = TOLERANCE * reference["std"]
    for ids, (tokens, likeliest) in zip(prompts, told, strict=True):
        assert len(tokens) == len(likeliest) == len(ids) + max_tokens
        assert tokens[0] is None and likeliest[0] is None
        following = [*ids[1:], int(wanted[len(ids) - 1].argmax())]
        rows = wanted[: len(tokens) - 1]
        of_tokens = rows[np.arange(len(rows)), following[: len(rows)]]
        assert np.abs(np.array(tokens[1:]) - of_tokens).max() <= tolerance
        for row, token, named in zip(rows, of_tokens, likeliest[1:], strict=True):
            # The likeliest, and the token itself where it is not among them.
            best = np.sort(row)[::-1][:TOP]
            expected = best if token >= best[-1] else np.append(best, token)
            assert np.abs(np.sort(list(named.values()))[::-1] - expected).max() <= tolerance
    if max_tokens:
        assert reference["greedy"][0] == wanted[len(prompt) - 1].argmax()


def _logprobs(client: httpx2.Client, body: dict[str, Any]) -> list[tuple[list[Any], list[Any]]]:
    """`token_logprobs` and `top_logprobs` of each choice."""
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    if not body["stream"]:
        parts = answer.json()["choices"]
    else:
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        parts = [choice for each in events for choice in json.loads(each)["choices"]]
    told: list[tuple[list[Any], list[Any]]] = [([], []) for _ in body["prompt"]]
    for part in parts:
        if part["logprobs"]:
            told[part["index"]][0].extend(part["logprobs"]["token_logprobs"])
            told[part["index"]][1].extend(part["logprobs"]["top_logprobs"])
    return told
