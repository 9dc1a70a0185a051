"""A checkpoint: its config and its tensors, from safetensors or GGUF, checked when it is opened. Imports no jax."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import ConfigError, ModelError, WeightError
from ..cache.config import CacheConfig
from ..compiler.panels import Packing
from ..compiler.weights import WeightTable
from . import gguf_index, gguf_names, safetensors_file
from .checkpoint_files import INDEX, CheckpointFiles, read_object, shortened
from .gguf_names import RopeOrder
from .safetensors_file import TensorInfo
from .tensor_stream import READABLE, read_stored, read_tensor

_ENCODINGS: dict[str, Packing] = {"BF16": "bfloat16", "Q8_0": "q8_0", "Q4_0": "q4_0", "Q4_K": "q4_k", "Q6_K": "q6_k"}
"""How the kernels take what a tensor holds; float32 stands for all other types."""


def encoding_of(tensor: TensorInfo) -> Packing:
    return _ENCODINGS.get(tensor.dtype, "float32")


@dataclass(frozen=True)
class Checkpoint:
    """What the files of a checkpoint hold, with names as in the Hugging Face form whatever the format.

    path:   what was given: a folder or a GGUF file
    source: what the config was read from, for messages
    stats:  size in bytes and mtime_ns of each file when it was opened, by name
    digest: sha256 over config.json, the headers of the weight files, and how they are read
    """

    path: Path
    source: str
    config: dict[str, Any]
    architecture: str
    files: list[Path]
    tensors: dict[str, TensorInfo]
    stats: dict[str, tuple[int, int]]
    digest: str

    @staticmethod
    def open(
        model: Path,
        weight_path: Path | None = None,
        rope_order: RopeOrder | None = None,
        cache: CacheConfig | None = None,
    ) -> Checkpoint:
        """Reads the config and every header; raises ModelError, or WeightError for damaged weight files.

        weight_path: a file to use instead of the model's own weights
        rope_order:  how a GGUF file has the rows of queries and keys, "normal" if None; ConfigError for other files
        cache:       where it is kept what a long header holds
        """
        found = CheckpointFiles.find(model, weight_path)
        files, stats = _stat(found)
        digest = hashlib.sha256()
        config: dict[str, Any] = {}
        if found.config is not None:
            config, raw = read_object(found.config)
            digest.update(hashlib.sha256(raw).digest())
        if found.gguf is None:
            if rope_order is not None:
                raise ConfigError(
                    f"--rope-type {rope_order} says how a GGUF file has its rows, and {model} has safetensors",
                    "Leave --rope-type out.",
                )
            tensors = _safetensors(found, digest)
        else:
            order = rope_order or "normal"
            header = gguf_index.read_header(found.gguf, cache)
            digest.update(f"{header.sha256} {order}".encode())
            tensors = gguf_names.tensors_of(header, order)
            config = config or gguf_names.config_of(header)
        source = found.config.name if found.config else f"the metadata of {found.weights[0].name}"
        return Checkpoint(model, source, config, _architecture(config), files, tensors, stats, digest.hexdigest())

    @property
    def encodings(self) -> dict[str, Packing]:
        """That of each matrix by its name: float32 stands for all that the kernels do not take as it is."""
        return {name: encoding_of(tensor) for name, tensor in self.tensors.items() if len(tensor.shape) > 1}

    @property
    def encoding(self) -> Packing:
        """That of most bytes of the matrices."""
        nbytes: Counter[Packing] = Counter()
        for name, encoding in self.encodings.items():
            nbytes[encoding] += self.tensors[name].nbytes
        return nbytes.most_common(1)[0][0] if nbytes else "float32"

    def identity(self) -> dict[str, Any]:
        """What tells this checkpoint from another or from a changed one, without reading the weights; fit for JSON."""
        files = [{"name": name, "bytes": size, "mtime_ns": mtime} for name, (size, mtime) in self.stats.items()]
        return {"path": str(self.path.resolve()), "files": files, "sha256": self.digest}

    def check(self, table: WeightTable) -> None:
        """Raises one WeightError that lists all missing, unexpected, misshapen and unreadable tensors."""
        expected = {name: shape for weight in table.weights for name, shape in weight.source_shapes()}
        found = {name: self.tensors[name] for name in expected if name in self.tensors}
        unexpected = [name for name in self.tensors if name not in expected and not table.ignores(name)]
        other_types = [f"{name} is {at.dtype}" for name, at in found.items() if at.dtype not in READABLE]
        problems = {
            "missing": [name for name in expected if name not in self.tensors],
            "unexpected": unexpected,
            "misshapen": [
                f"{name} is {at.shape}, {self.source} needs {expected[name]}"
                for name, at in found.items()
                if at.shape != expected[name]
            ],
            "of a type that is not read": other_types,
        }
        listed = [f"{len(names)} {what} ({shortened(names)})" for what, names in problems.items() if names]
        if listed:
            raise WeightError(
                f"the tensors in {self.path} are not those of {self.source}: {'; '.join(listed)}",
                f"Weights and settings of one {self.architecture} checkpoint are needed, in "
                f"{', '.join(READABLE)}; is the download complete?",
            )

    def read_into(
        self, name: str, out: np.ndarray, transposed: bool = False, rows: tuple[int, int] | None = None
    ) -> None:
        """Fills `out` with the rows [first, last) of a tensor that `check` has passed; see `read_tensor`."""
        read_tensor(self.tensors[name], out, transposed=transposed, rows=rows)

    def read_stored_into(self, name: str, out: np.ndarray, rows: tuple[int, int]) -> None:
        """Fills uint8 `out` with the blocks of these rows of a quantized matrix; see `read_stored`."""
        read_stored(self.tensors[name], out, rows)


def _safetensors(found: CheckpointFiles, digest: Any) -> dict[str, TensorInfo]:
    """The tensors of all files, whose headers are added to the digest."""
    tensors: dict[str, TensorInfo] = {}
    for file in found.weights:
        header = safetensors_file.read_header(file)
        digest.update(hashlib.sha256(header.raw).digest())
        tensors |= {name: at for name, at in header.tensors.items() if found.placed.get(name, file.name) == file.name}
    wrong = [f"{name} in {file}" for name, file in found.placed.items() if name not in tensors]
    if wrong:
        raise WeightError(
            f"{INDEX} names {len(wrong)} tensors that their files do not hold: {shortened(wrong)}",
            "Index and weight files are of different downloads: fetch both again.",
        )
    return tensors


def _stat(found: CheckpointFiles) -> tuple[list[Path], dict[str, tuple[int, int]]]:
    """The files that there are, and size and mtime_ns of each: by name, or by path outside the folder."""
    files, stats = [], {}
    for file in found.candidates:
        try:
            stat = file.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}", "Check its permissions.") from None
        files.append(file)
        inside = file.parent == found.model or file == found.model
        stats[file.name if inside else str(file.resolve())] = (stat.st_size, stat.st_mtime_ns)
    return files, stats


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    raise ModelError(
        'config.json names no architecture: "architectures" is missing or not a list of names',
        "Use the config.json that came with the weights; `max list` shows the architectures there are.",
    )
