"""Reads a YAML file of settings, with the booleans of YAML 1.2: `cache_policy: on` is a word, not true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .. import ConfigError


class _Loader(yaml.SafeLoader):
    """Plain scalars, true and false only as booleans, no dates, and no key twice."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag != "tag:yaml.org,2002:timestamp" and not (tag == "tag:yaml.org,2002:bool" and first not in "tTfF")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_settings_file(path: Path) -> dict[str, Any]:
    """The settings in the file at `path`, {} when it is empty; raises ConfigError when it holds anything else."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}", "Check the path given with --config-file.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: {error.problem}", "Correct the YAML there.") from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "Give a YAML file of settings.") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path} holds no settings", "Write one `name: value` per line, names with underscores.")
    return content
