"""Where the text side of a checkpoint is read from: small files of a folder, or what a GGUF file has in their place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tokenizers import Tokenizer as Backend

from .. import ModelError
from ..runtime.checkpoint_files import CheckpointFiles, is_gguf
from .checkpoint_json import read_json_object

if TYPE_CHECKING:
    from ..cache.config import CacheConfig

_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class TextFiles(Protocol):
    """The text side of one checkpoint, by the names that its parts have in the Hugging Face form."""

    @property
    def present(self) -> list[Path]:
        """The files of its own that it is read from; those of the weights do not count."""
        ...

    def path(self, name: str) -> str:
        """What messages call the part `name`."""
        ...

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object of a part, {} where there is none; raises ModelError when it is damaged."""
        ...

    def templates(self) -> dict[str, str]:
        """Chat templates in files of their own, by name; raises ModelError when one cannot be read."""
        ...

    def backend(self) -> Backend:
        """The tokenizer; raises ModelError when there is none or it is damaged."""
        ...


class FolderText:
    """The files of a folder in the Hugging Face form."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    @property
    def present(self) -> list[Path]:
        return [path for name in _FILES if (path := self._folder / name).is_file()]

    def path(self, name: str) -> str:
        return str(self._folder / name)

    def json(self, name: str) -> dict[str, Any]:
        return read_json_object(self._folder / name)

    def templates(self) -> dict[str, str]:
        """chat_template.jinja as "default", and those of additional_chat_templates/."""
        named = {path.stem: path for path in sorted((self._folder / "additional_chat_templates").glob("*.jinja"))}
        if (default := self._folder / "chat_template.jinja").is_file():
            named["default"] = default
        return {name: _read(path) for name, path in named.items()}

    def backend(self) -> Backend:
        path = self._folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{self._folder} has no tokenizer.json",
                "Download the checkpoint's tokenizer files, or name another folder.",
            )
        try:
            return Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise ModelError(f"{path} cannot be read: {error}", "Download the file again.") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"the chat template {path} cannot be read: {error}", "Download the file again.") from error


def find_text(model: Path, weight_path: Path | None = None, cache: CacheConfig | None = None) -> TextFiles:
    """The folder's own files where it has a tokenizer.json, else what the GGUF file holds. Raises ModelError.

    cache: where what has to be converted is kept
    """
    if not is_gguf(model) and (model / "tokenizer.json").is_file():
        return FolderText(model)
    files = CheckpointFiles.find(model, weight_path)
    if files.gguf is None:
        return FolderText(model)
    from .gguf_text import GgufText

    return GgufText(files.gguf, cache)
