"""Documents name files that exist, and docs/structure.md leaves none out."""

import re
from pathlib import Path

import pytest

from max.models.table import ARCHITECTURES

ROOT = Path(__file__).parents[3]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/structure.md"]
FOLDERS = ("bench", "cache", "cli", "compiler", "models", "runtime", "serve")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    document = ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert not [link for link in links if not (document.parent / link).exists()]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_in_backticks_exist(name: str) -> None:
    prefix = "|".join((*FOLDERS, "tests", "docs"))
    paths = re.findall(rf"`((?:{prefix})/[\w./-]+)`", (ROOT / name).read_text())
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_file_has_its_line_in_the_structure() -> None:
    text = (ROOT / "docs" / "structure.md").read_text()
    missing = []
    for folder in FOLDERS:
        section = text.partition(f"### {folder}/\n")[2].partition("\n#")[0]
        for path in sorted((ROOT / folder).glob("*.py")):
            # Architectures share one line.
            names = {path.name, path.name.replace(path.stem.removesuffix("_config"), "<x>")}
            if path.name != "__init__.py" and not any(f"`{name}`" in section for name in names - _shared(path)):
                missing.append(f"{folder}/{path.name}")
    assert not missing


def _shared(path: Path) -> set[str]:
    """The names that stand for every architecture do so for modules of the table only."""
    modules = {name for row in ARCHITECTURES.values() for name in (row.config_module, row.model_module)}
    return set() if path.parent.name == "models" and f".{path.stem}" in modules else {"<x>.py", "<x>_config.py"}
