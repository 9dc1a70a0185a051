"""Reads the small JSON files of a checkpoint, which may be absent but not damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .. import ModelError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in the file at `path`, {} when there is no file; raises ModelError when it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "Download the file again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds no JSON object", "Download the file again.")
    return value
