"""A checkpoint: a local folder in the Hugging Face form, checked when it is opened. Imports no jax."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import ModelError, WeightError
from ..compiler.weights import WeightTable
from .safetensors_file import TensorInfo, read_header
from .tensor_stream import FLOAT_DTYPES, read_tensor

MAX_JSON_BYTES = 32_000_000
NAMES_SHOWN = 12

_INDEX = "model.safetensors.index.json"
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds: its config, its tensors, and the files they came from (those that there are).

    stats:  size in bytes and mtime_ns of each file when it was opened, by name
    digest: sha256 over config.json and the headers of the weight files
    """

    path: Path
    config: dict[str, Any]
    architecture: str
    files: list[Path]
    tensors: dict[str, TensorInfo]
    stats: dict[str, tuple[int, int]]
    digest: str

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Reads config.json and every header; raises ModelError, or WeightError for damaged weight files."""
        _check_folder(folder)
        config_file = folder / "config.json"
        config, config_bytes = _read_object(config_file)
        architecture = _architecture(config)
        weight_files, placed = _weight_files(folder)
        files, stats = _stat([config_file, *weight_files, *(folder / name for name in (_INDEX, *_TEXT_FILES))])
        digest = hashlib.sha256(hashlib.sha256(config_bytes).digest())
        tensors: dict[str, TensorInfo] = {}
        for file in weight_files:
            header = read_header(file)
            digest.update(hashlib.sha256(header.raw).digest())
            here = {name: at for name, at in header.tensors.items() if placed.get(name, file.name) == file.name}
            tensors.update(here)
        _check_index(placed, tensors)
        return Checkpoint(folder, config, architecture, files, tensors, stats, digest.hexdigest())

    @property
    def encoding(self) -> Literal["float32", "bfloat16"]:
        """That of most bytes of the tensors: float32 stands for all but bfloat16."""
        half = sum(tensor.nbytes for tensor in self.tensors.values() if tensor.dtype == "BF16")
        return "bfloat16" if 2 * half > sum(tensor.nbytes for tensor in self.tensors.values()) else "float32"

    def identity(self) -> dict[str, Any]:
        """What tells this checkpoint from another or from a changed one, without reading the weights; fit for JSON."""
        files = [{"name": name, "bytes": size, "mtime_ns": mtime} for name, (size, mtime) in self.stats.items()]
        return {"path": str(self.path.resolve()), "files": files, "sha256": self.digest}

    def check(self, table: WeightTable) -> None:
        """Raises one WeightError that lists all missing, unexpected, misshapen and non-float tensors."""
        expected = {name: shape for weight in table.weights for name, shape in weight.source_shapes()}
        found = {name: self.tensors[name] for name in expected if name in self.tensors}
        unexpected = [name for name in self.tensors if name not in expected and not table.ignores(name)]
        other_types = [f"{name} is {at.dtype}" for name, at in found.items() if at.dtype not in FLOAT_DTYPES]
        problems = {
            "missing": [name for name in expected if name not in self.tensors],
            "unexpected": unexpected,
            "misshapen": [
                f"{name} is {at.shape}, config.json needs {expected[name]}"
                for name, at in found.items()
                if at.shape != expected[name]
            ],
            "not of a float type": other_types,
        }
        listed = [f"{len(names)} {what} ({_shortened(names)})" for what, names in problems.items() if names]
        if listed:
            raise WeightError(
                f"the tensors in {self.path} are not those of its config.json: {'; '.join(listed)}",
                f"Weights and config.json of one {self.architecture} checkpoint are needed, in "
                f"{', '.join(FLOAT_DTYPES)}; is the download complete?",
            )

    def read_into(
        self, name: str, out: np.ndarray, transposed: bool = False, rows: tuple[int, int] | None = None
    ) -> None:
        """Fills float32 `out` with the rows [first, last) of a tensor that `check` has passed; see `read_tensor`."""
        read_tensor(self.tensors[name], out, transposed=transposed, rows=rows)


def _check_folder(folder: Path) -> None:
    text = str(folder)
    hint = "A local folder with config.json and model.safetensors is needed."
    if _HUB_ID.fullmatch(text):
        hint = f"Nothing is downloaded: fetch {text} first, then give the folder that it is in."
    try:
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ModelError(f"{text} is no checkpoint: it holds no config.json", hint)
        elif folder.exists():
            raise ModelError(f"{text} is a file, not a folder", "Give the folder that holds config.json.")
        else:
            raise ModelError(f"there is no folder {text}", hint)
    except (OSError, ValueError) as error:  # a name too long, no permission, a NUL in the name
        raise ModelError(f"{text[:200]!r} cannot be opened: {error}", hint) from None


def _stat(candidates: list[Path]) -> tuple[list[Path], dict[str, tuple[int, int]]]:
    """The files that there are, and size and mtime_ns of each by name."""
    files, stats = [], {}
    for file in candidates:
        try:
            stat = file.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}", "Check its permissions.") from None
        files.append(file)
        stats[file.name] = (stat.st_size, stat.st_mtime_ns)
    return files, stats


def _read_object(file: Path) -> tuple[dict[str, Any], bytes]:
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


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    raise ModelError(
        'config.json names no architecture: "architectures" is missing or not a list of names',
        "Use the config.json that came with the weights; `max list` shows the architectures there are.",
    )


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a folder, and by the index, if it has one, the file of each tensor."""
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.is_file():
        return [single], {}
    if not index.is_file():
        others = sorted(file.name for pattern in ("*.bin", "*.gguf", "*.pth") for file in folder.glob(pattern))
        found = f" (there is {_shortened(others)}, which is not read)" if others else ""
        raise ModelError(
            f"{folder} holds no weights: neither model.safetensors nor {_INDEX}{found}",
            "Download the safetensors files of the checkpoint, or convert it to safetensors.",
        )
    placed = _read_object(index)[0].get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(_is_file_name(name) for name in placed.values()):
        raise ModelError(
            f'{index}: "weight_map" is not an object of tensor names and file names', "Download the index again."
        )
    shards = [folder / name for name in sorted(set(placed.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(shards)} weight files are missing in {folder}: {_shortened(missing)}",
            "The download is incomplete: fetch these files too.",
        )
    return shards, placed


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _check_index(placed: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    wrong = [f"{name} in {file}" for name, file in placed.items() if name not in tensors]
    if wrong:
        raise WeightError(
            f"{_INDEX} names {len(wrong)} tensors that their files do not hold: {_shortened(wrong)}",
            "Index and weight files are of different downloads: fetch both again.",
        )


def _shortened(names: Sequence[str]) -> str:
    more = [f"and {len(names) - NAMES_SHOWN} more"] if len(names) > NAMES_SHOWN else []
    return ", ".join([*names[:NAMES_SHOWN], *more])
