"""Canonical JSON: one byte string for each value, so that digests over it can be compared.

Keys are sorted, there is no white space, everything is ASCII. Integers, floats and booleans stay apart (`1`, `1.0` and
`true` differ): a needless difference costs one compilation, a wrong equality would run the wrong code.
"""

import json
import math
from typing import Any


def plain(value: Any, path: str = "value") -> Any:
    """Returns `value` in the form that reading its canonical JSON gives back: tuples as lists, nothing but JSON types.

    Raises: TypeError for anything else than None, bool, int, finite float, str, list, tuple and dict with str keys;
    the message names the place.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise TypeError(f"{path} is {value}, which JSON cannot hold")
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str:
                raise TypeError(f"{path} has the key {key!r}, which is not a string")
        return {key: plain(item, f"{path}.{key}") for key, item in value.items()}
    raise TypeError(f"{path} is a {type(value).__name__}, which canonical JSON does not hold")


def canonical_json(value: Any) -> bytes:
    """Encodes `value` so that equal values give equal bytes.

    Raises: TypeError as `plain` does.
    """
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
