"""Which files a checkpoint is made of: a folder in the Hugging Face form, a GGUF file, or one of them beside the other.

Imports no jax.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import ModelError

MAX_JSON_BYTES = 32_000_000
NAMES_SHOWN = 12
INDEX = "model.safetensors.index.json"

_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class CheckpointFiles:
    """The files that there are, by what they are for.

    model:  what was given: a folder, or a GGUF file
    config: config.json, or None where the metadata of a GGUF file take its place
    weights: one GGUF file, or safetensors files
    placed: by the index of several safetensors files, the file of each tensor
    """

    model: Path
    config: Path | None
    weights: tuple[Path, ...]
    placed: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def find(model: Path, weight_path: Path | None = None) -> CheckpointFiles:
        """Looks at names only, not into weights; `weight_path` is used instead of the folder's own weights.

        Raises ModelError where something is missing, or where there are several GGUF files to choose from.
        """
        _check_exists(model)
        if is_gguf(model):
            if weight_path is not None:
                raise ModelError(
                    f"{model} holds weights itself, and --weight-path gives others",
                    "Give one of them, or a folder with config.json as --model.",
                )
            return CheckpointFiles(model, None, (model,))
        if not model.is_dir():
            raise ModelError(f"{model} is a file, not a folder", "Give a GGUF file, or the folder of a checkpoint.")
        weights, placed = _weights(model) if weight_path is None else ((_resolved(model, weight_path),), {})
        config = model / "config.json"
        if config.is_file():
            return CheckpointFiles(model, config, weights, placed)
        if not is_gguf(weights[0]):
            raise _no_config(model)
        return CheckpointFiles(model, None, weights)

    @property
    def gguf(self) -> Path | None:
        """The GGUF file with the weights, None where they are safetensors."""
        return self.weights[0] if is_gguf(self.weights[0]) else None

    @property
    def candidates(self) -> list[Path]:
        """The files that make up the checkpoint; those for text may not be there."""
        own = [] if self.model.is_file() else [self.model / name for name in (INDEX, *_TEXT_FILES)]
        return [*([self.config] if self.config else []), *self.weights, *own]


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def read_object(file: Path) -> tuple[dict[str, Any], bytes]:
    """A JSON object and the bytes it was parsed from; raises ModelError."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            raise ValueError(f"it is over {MAX_JSON_BYTES} bytes long")
        value = json.loads(raw.decode("utf-8-sig"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}", "Check its permissions.") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {error}", "Is the download complete?") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a JSON object", "Is it the file that came with the weights?")
    return value, raw


def shortened(names: Sequence[str]) -> str:
    more = [f"and {len(names) - NAMES_SHOWN} more"] if len(names) > NAMES_SHOWN else []
    return ", ".join([*names[:NAMES_SHOWN], *more])


def _check_exists(model: Path) -> None:
    text = str(model)
    hint = "A GGUF file is needed, or a local folder with config.json and model.safetensors."
    if _HUB_ID.fullmatch(text) and not is_gguf(model):
        hint = f"Nothing is downloaded: fetch {text} first, then give the folder that it is in."
    try:
        if not model.exists():
            raise ModelError(f"there is no {'file' if is_gguf(model) else 'folder'} {text}", hint)
        if model.is_dir():
            next(model.iterdir(), None)
    except (OSError, ValueError) as error:  # a name too long, no permission, a NUL in the name
        raise ModelError(f"{text[:200]!r} cannot be opened: {error}", hint) from None


def _no_config(folder: Path) -> ModelError:
    return ModelError(
        f"{folder} is no checkpoint: it holds no config.json",
        "A GGUF file is needed, or a local folder with config.json and model.safetensors.",
    )


def _resolved(folder: Path, weight_path: Path) -> Path:
    """The file that --weight-path names, from here or from the folder."""
    for path in (weight_path, folder / weight_path):
        if path.is_file():
            if not is_gguf(path) and path.suffix != ".safetensors":
                raise ModelError(f"{path} is neither .gguf nor .safetensors", "Weights are read from these two.")
            return path
    raise ModelError(
        f"there is no file {weight_path}, here or in {folder}", "Give --weight-path a local GGUF or safetensors file."
    )


def _weights(folder: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """The weight files of a folder, and by the index, if it has one, the file of each tensor."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return (single,), {}
    if index.is_file():
        return _indexed(folder, index)
    if not (files := sorted(path for path in folder.iterdir() if is_gguf(path))):
        raise _no_weights(folder)
    if len(files) > 1:
        raise ModelError(
            f"{folder} holds several GGUF files: {shortened([file.name for file in files])}",
            f"Choose one, for example --weight-path {files[0].name}.",
        )
    return (files[0],), {}


def _no_weights(folder: Path) -> ModelError:
    if not (folder / "config.json").is_file():
        return _no_config(folder)
    others = sorted(file.name for pattern in ("*.bin", "*.pth") for file in folder.glob(pattern))
    found = f" (there is {shortened(others)}, which is not read)" if others else ""
    return ModelError(
        f"{folder} holds no weights: neither model.safetensors, nor {INDEX}, nor a GGUF file{found}",
        "Download the safetensors files of the checkpoint, or convert it to safetensors.",
    )


def _indexed(folder: Path, index: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    placed = read_object(index)[0].get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(_is_file_name(name) for name in placed.values()):
        raise ModelError(
            f'{index}: "weight_map" is not an object of tensor names and file names', "Download the index again."
        )
    shards = [folder / name for name in sorted(set(placed.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(shards)} weight files are missing in {folder}: {shortened(missing)}",
            "The download is incomplete: fetch these files too.",
        )
    return tuple(shards), placed


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
