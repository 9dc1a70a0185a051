"""`max generate` as its user meets it: what goes to stdout and to stderr, and what each option does to the text."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from max.serve.text_output import CompletionText

REPLACEMENT = "\ufffd"


@pytest.fixture
def ids(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The token ids that commands in this process generate."""
    seen: list[int] = []
    push = CompletionText.push

    def spy(self: CompletionText, token_id: int) -> object:
        seen.append(token_id)
        return push(self, token_id)

    monkeypatch.setattr(CompletionText, "push", spy)
    yield seen


def answer(generate: Callable, *arguments: str) -> dict:
    return json.loads(generate("--json", *arguments).out)


def test_stdout_is_the_text_and_stderr_the_statistics(generate, ids, model: Path) -> None:
    done = generate()
    expected = Tokenizer.from_file(str(model / "tokenizer.json")).decode(ids, skip_special_tokens=True)
    assert done.out == expected + "\n"
    assert REPLACEMENT in expected and len(expected) > 40  # an answer with bytes that are no UTF-8
    counts, figures = done.errors
    assert counts == f"19 prompt tokens, {len(ids)} new tokens, ended by length, seed 1"
    assert re.fullmatch(
        r"startup [\d.]+ s \(bound\), first token after \d+ ms, prefill [\d,]+ tok/s, decode [\d,.]+ tok/s, "
        r"peak memory [\d,]+ MB",
        figures,
    )


def test_json_holds_the_same_text(generate) -> None:
    plain, done = generate(), generate("--json")
    assert done.err == ""
    found = json.loads(done.out)
    assert found["text"] + "\n" == plain.out
    assert (found["prompt_tokens"], found["new_tokens"], found["finish_reason"], found["seed"]) == (19, 45, "length", 1)
    assert found["decode_rate"] > 0 and found["prefill_rate"] > 0 and found["peak_memory_bytes"] > 1 << 20
    assert 0 < found["first_token_seconds"] < found["startup_seconds"] * 1000


def test_text_comes_piece_by_piece_and_whole(generate, ids, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    monkeypatch.setattr("max.cli.generation._stream", pieces.append)
    generate()
    text = answer(generate)["text"]
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > len(ids) / 4
    for piece in pieces:
        piece.encode()  # a split character would be a lone surrogate, or a replacement more than in the whole


def test_equal_seeds_give_equal_texts(generate) -> None:
    first = answer(generate, "--seed", "7")
    assert answer(generate, "--seed", "7")["text"] == first["text"] != answer(generate, "--seed", "8")["text"]
    drawn = [answer(generate, "--config-file", os.devnull, "--seed", str(seed))["text"] for seed in (0, (1 << 64) - 1)]
    assert drawn[0] != drawn[1]


def test_a_drawn_seed_is_shown_and_gives_the_text_again(call, small, model: Path, filled_cache: Path) -> None:
    place = ("generate", "--model", str(model), "--cache-dir", str(filled_cache), *small, "--prompt", "hello", "--json")
    first, second = (json.loads(call(*place).out) for _ in range(2))
    assert first["seed"] != second["seed"] and first["text"] != second["text"]
    assert json.loads(call(*place, "--seed", str(first["seed"])).out)["text"] == first["text"]


def test_greedy_text_has_no_need_of_a_seed(generate) -> None:
    texts = {answer(generate, "--seed", seed, *greedy)["text"] for seed in "12" for greedy in GREEDY}
    assert len(texts) == 1


GREEDY = (("--temperature", "0"), ("--top-k", "1"))


def test_sampling_options_change_the_text(generate) -> None:
    plain = answer(generate)["text"]
    for option in (("--temperature", "0.3"), ("--top-k", "3"), ("--top-p", "0.2"), ("--min-p", "0.9")):
        assert answer(generate, *option)["text"] != plain
    greedy = answer(generate, "--temperature", "0")["text"]
    for name in ("--repetition-penalty", "--frequency-penalty", "--presence-penalty"):
        assert answer(generate, "--temperature", "0", name, "2")["text"] != greedy


def test_max_new_tokens_counts_tokens(generate, ids) -> None:
    assert answer(generate, "--max-new-tokens", "3")["new_tokens"] == len(ids) == 3
    ids.clear()
    assert answer(generate, "--max-new-tokens", "-1")["new_tokens"] == len(ids) == 64 - 19


def test_a_prompt_that_leaves_room_for_one_token(generate) -> None:
    room = 64 - answer(generate, "--prompt", "!", "--max-new-tokens", "1")["prompt_tokens"]
    found = answer(generate, "--prompt", "!" * room)
    assert (found["prompt_tokens"], found["new_tokens"], found["finish_reason"]) == (63, 1, "length")
    assert generate("--prompt", "!" * (room + 1), code=2).err.startswith("error: the prompt has 64 tokens")


def test_a_stop_string_across_tokens_cuts_the_text(generate, ids, model: Path) -> None:
    text = answer(generate)["text"]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    edge = next(
        at
        for count in range(4, len(ids))
        if REPLACEMENT not in tokenizer.decode(ids[:count])
        and text[(at := len(tokenizer.decode(ids[:count]))) - 1 : at + 1].isalpha()
        and text.find(text[at - 1 : at + 1]) == at - 1
    )
    found = answer(generate, "--stop", text[edge - 1 : edge + 1], "--stop", "never in there")
    assert (found["text"], found["finish_reason"]) == (text[: edge - 1], "stop")
    assert generate("--stop", text[edge - 1 : edge + 1]).out == text[: edge - 1] + "\n"


def test_stop_token_ids_end_the_answer_and_are_not_shown(generate, ids, model: Path) -> None:
    generate()
    whole = list(ids)
    at = next(at for at in range(3, len(whole)) if whole[at] not in whole[:at])
    found = answer(generate, "--stop-token-ids", f"639,{whole[at]}")
    expected = Tokenizer.from_file(str(model / "tokenizer.json")).decode(whole[:at])
    assert (found["text"], found["finish_reason"], found["new_tokens"]) == (expected, "stop", at + 1)


def test_min_new_tokens_come_before_a_stop(generate, ids) -> None:
    generate()
    first = ids[0]
    assert answer(generate, "--stop-token-ids", str(first))["new_tokens"] == 1
    ids.clear()
    assert answer(generate, "--stop-token-ids", str(first), "--min-new-tokens", "20")["new_tokens"] > 20
    assert first not in ids[:20]


def test_ignore_eos_goes_on_to_the_limit(call, generate, ids, small, model: Path, cache: Path, tmp_path: Path) -> None:
    generate()
    at = next(at for at in range(3, len(ids)) if ids[at] not in ids[:at])
    ending = shutil.copytree(model, tmp_path / "ending")
    # 100000 is not in the vocabulary: tokenizers list more tokens than some models have.
    (ending / "generation_config.json").write_text(json.dumps({"eos_token_id": [100000, ids[at]]}))
    place = ("generate", "--model", str(ending), "--cache-dir", str(cache), *small, "--prompt", "hello", "--seed", "1")
    stopped = json.loads(call(*place, "--json").out)
    assert (stopped["new_tokens"], stopped["finish_reason"]) == (at + 1, "stop")
    assert stopped["source"] == "same shape"
    on = json.loads(call(*place, "--json", "--ignore-eos", "--max-new-tokens", str(at + 4)).out)
    assert (on["new_tokens"], on["finish_reason"]) == (at + 4, "length")


def test_the_chat_template_can_be_left_out_or_given(generate, tmp_path: Path) -> None:
    chat, bare = answer(generate), answer(generate, "--no-apply-chat-template")
    assert (chat["prompt_tokens"], bare["prompt_tokens"]) == (19, 3)
    template = "{{ messages[0]['content'] }}"
    (tmp_path / "template.jinja").write_text(template)
    for given in (template, str(tmp_path / "template.jinja")):
        assert answer(generate, "--chat-template", given)["text"] == bare["text"] != chat["text"]


def test_warmups_do_not_change_the_answer(generate, ids) -> None:
    once = answer(generate)
    ids.clear()
    warmed = answer(generate, "--num-warmups", "2")
    assert warmed["text"] == once["text"] and warmed["new_tokens"] == once["new_tokens"]
    assert len(ids) == 3 * once["new_tokens"]


def test_settings_come_from_a_file_and_from_the_environment(
    call, generate, small, model: Path, filled_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [flag.removeprefix("--").replace("-", "_") for flag in small[::2]]
    lines = [f"{name}: {value}" for name, value in zip(names, small[1::2], strict=True)]
    lines += [f"model_path: {model}", "generate_config:", "  prompt: hello", "  json_output: true"]
    (tmp_path / "settings.yaml").write_text("\n".join(lines))
    monkeypatch.setenv("MODULAR_CACHE_DIR", str(filled_cache))
    monkeypatch.setenv("MAX_SEED", "1")
    found = json.loads(call("generate", "--config-file", str(tmp_path / "settings.yaml")).out)
    assert found["text"] == answer(generate)["text"] and found["source"] == "bound"


def test_the_printed_settings_are_a_file_of_settings(
    call, generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODULAR_CACHE_DIR")  # the environment would win over the file
    printed = generate("--print-config", "--stop", "a: b", "--stop-token-ids", "3,4", "--top-p", "0.9")
    assert printed.err == ""
    (tmp_path / "settings.yaml").write_text(printed.out)
    file = ("generate", "--config-file", str(tmp_path / "settings.yaml"))
    assert call(*file, "--print-config").out == printed.out
    again = json.loads(call(*file, "--json").out)
    assert again["text"] == answer(generate, "--stop", "a: b", "--stop-token-ids", "3,4", "--top-p", "0.9")["text"]


def test_debug_says_what_was_compiled(run, small, model: Path, filled_cache: Path) -> None:
    done = run(
        "--log-level", "debug", "generate", "--model", str(model), "--cache-dir", str(filled_cache), *small,
        "--prompt", "hello", "--seed", "1",
    )  # fmt: skip
    assert done.code == 0
    assert re.search(r"graphs and executables traced=0 compiled=0 loaded=\d", done.errors[-1])
    assert any("preparation Report(" in line for line in done.errors)


def test_the_built_in_model_answers(run, small, tmp_path: Path) -> None:
    done = run(
        "generate", "--prompt", "robot:", *small, "--temperature", "0", "--max-new-tokens", "8",
        "--cache-dir", str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.code == 0 and done.out.strip()
    assert done.errors[0] == "no --model given: using the built-in dictionary model"


def test_a_terminal_of_another_encoding_gets_what_it_can_show(run, generate, small, model, filled_cache) -> None:
    place = ("generate", "--model", str(model), "--cache-dir", str(filled_cache), *small)
    settings = {"environ": {"PYTHONIOENCODING": "latin-1"}, "encoding": "latin-1"}
    done = run(*place, "--prompt", "hello", "--seed", "1", **settings)
    assert (done.code, done.out) == (0, generate().out.encode("latin-1", "replace").decode("latin-1"))


def test_a_full_disk_under_stdout_is_told(run, small, model: Path, filled_cache: Path) -> None:
    place = ("generate", "--model", str(model), "--cache-dir", str(filled_cache), *small, "--prompt", "hello")
    with open("/dev/full", "w") as full:
        done = run(*place, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.code == 3
    assert done.errors == [
        "error: the output cannot be written: No space left on device", "hint: Free some space there."
    ]  # fmt: skip


def test_closed_streams_do_not_stop_it(small, model: Path, filled_cache: Path) -> None:
    place = ["generate", "--model", str(model), "--cache-dir", str(filled_cache), *small, "--prompt", "hello"]
    shell = 'exec "$@" >&- 2>&-'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-m", "max", *place], cwd="/", timeout=120, check=False
    )
    assert done.returncode == 0


def test_a_reader_that_has_gone_is_no_error(small, model: Path, filled_cache: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    place = ("generate", "--model", str(model), "--cache-dir", str(filled_cache), *small, "--prompt", "hello")
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "max", *place],
            stdout=pipe, stderr=subprocess.PIPE, cwd="/", timeout=120, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, b"")
