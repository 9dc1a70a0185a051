"""The rules that no single file can show: floors, lazy imports, private names, classified settings."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from max.cache.fields import Section, unclassified
from max.cli.commands import COMMANDS
from max.cli.main import group
from max.models.table import ARCHITECTURES

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FLOORS = {"cache": 0, "compiler": 1, "models": 2, "runtime": 3, "serve": 4, "bench": 4, "cli": 5}
PEERS = ROOT / "bench" / "peers"
ROOT_SOURCES = [path for path in ROOT.glob("*.py") if path.name != "setup.py"]  # which only builds the package
SOURCES = sorted([*ROOT_SOURCES, *(path for folder in FLOORS for path in (ROOT / folder).rglob("*.py"))])
PRIVATE = re.compile(r"\bjax\._src\b|\bjaxlib\._jax\b|\bxla_client\b|\._xla\b|\bfrom jaxlib import (?!mlir\b)")
HEAVY = {"jax", "jaxlib", "flax", "transformers", "orbax", "torch"}


@dataclass(frozen=True)
class Import:
    """One import in a file of the package, in absolute dotted form."""

    path: Path
    line: int
    module: str
    is_lazy: bool
    """Whether it stands inside a function, or is for type checkers only."""

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def imports_of(path: Path) -> Iterator[Import]:
    """Every import in the file, lazy and type-checking ones included."""
    package = ("max", *path.relative_to(ROOT).parent.parts)

    def walk(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else ()
                module = ".".join([*base, *([child.module] if child.module else [])])
                # `from . import name` may name a module, and is then an import of that module.
                names = [module if child.module else f"{module}.{alias.name}" for alias in child.names]
            for name in dict.fromkeys(names):
                yield Import(path, getattr(child, "lineno", 0), name, in_function or for_types)
            yield from walk(
                child,
                in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)),
                for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)),
            )

    yield from walk(ast.parse(path.read_text()), in_function=False, for_types=False)


def folder_of(module: str) -> str:
    """The folder that a module of the package lies in, "" for the root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else ""


IMPORTS = [found for path in SOURCES for found in imports_of(path)]
INTERNAL = [found for found in IMPORTS if found.module.partition(".")[0] == "max"]
EXTERNAL = [found for found in IMPORTS if found.module.partition(".")[0] not in {"max", *sys.stdlib_module_names}]


def own_folder(found: Import) -> str:
    parts = found.path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else ""


def test_the_walk_sees_relative_absolute_lazy_and_type_checking_imports() -> None:
    seen = {(found.path.name, found.module, found.is_lazy) for found in IMPORTS}
    assert ("__main__.py", "max.cli.main", False) in seen
    assert ("xla.py", "jaxlib", True) in seen
    assert ("xla.py", "max.compiler.counters", False) in seen
    assert ("artifact.py", "jaxlib.mlir", True) in seen
    assert ("artifact.py", "max.compiler.merge", False) in seen


def test_a_file_imports_from_floors_below_and_its_own_folder_only() -> None:
    wrong = []
    for found in INTERNAL:
        own, target = own_folder(found), folder_of(found.module)
        if not own or not target or own == target:
            continue
        if FLOORS[target] >= FLOORS[own]:
            wrong.append(str(found))
    assert not wrong


def test_the_root_imports_nothing_of_the_package() -> None:
    assert not [str(found) for found in INTERNAL if found.path == ROOT / "__init__.py"]


def test_the_runtime_reaches_models_on_a_miss_only() -> None:
    eager = [f for f in INTERNAL if own_folder(f) == "runtime" and folder_of(f.module) == "models" and not f.is_lazy]
    assert not [str(found) for found in eager]


def test_no_graph_depends_on_what_the_key_leaves_out() -> None:
    """models/builtin is not part of the sources' digest, so nothing that makes graphs may import it."""
    users = [
        f for f in INTERNAL if own_folder(f) in ("cache", "compiler", "models") and "max.models.builtin" in f.module
    ]
    assert not [str(found) for found in users if found.path.parent.name != "builtin"]


def test_the_cache_imports_no_array_library() -> None:
    banned = HEAVY | {"numpy"}
    assert not [str(f) for f in EXTERNAL if own_folder(f) == "cache" and f.module.partition(".")[0] in banned]


def test_private_names_of_jax_stand_in_the_adapter() -> None:
    users = {path for path in SOURCES if PRIVATE.search(path.read_text())}
    assert users == set((ROOT / "compiler").glob("xla*.py"))


def test_every_third_party_import_is_a_declared_dependency() -> None:
    project = PROJECT["project"]
    declared = {canonical(line) for line in [*project["dependencies"], *project["optional-dependencies"]["train"]]}
    owners = importlib.metadata.packages_distributions()
    undeclared = [
        str(found)
        for found in EXTERNAL
        if found.path.parent != PEERS  # whose files run in other environments
        and not declared & {canonical(name) for name in owners.get(found.module.partition(".")[0], ())}
    ]
    assert not undeclared


def test_the_peers_import_what_their_environments_hold() -> None:
    stated = "".join(path.read_text() for path in PEERS.glob("requirements-*.txt"))
    names = {canonical(line).replace("-", "_") for line in stated.splitlines()}
    modules = {found.module.partition(".")[0] for found in EXTERNAL if found.path.parent == PEERS}
    assert {"llama_cpp", "openvino_genai"} <= modules
    assert all(any(name.startswith(module) for name in names) for module in modules)


def canonical(requirement: str) -> str:
    """The name of a requirement as packages compare it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def test_nothing_is_left_for_later_in_a_comment() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX)\b")
    assert not [path.relative_to(ROOT).as_posix() for path in SOURCES if marks.search(path.read_text())]


def sections() -> list[type[Section]]:
    """Every section of the package, found by its base class in the sources."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and "Section" in map(ast.unparse, node.bases):
                module = ".".join(["max", *path.relative_to(ROOT).with_suffix("").parts])
                found.append(getattr(importlib.import_module(module), node.name))
    return found


def test_every_decision_has_a_number_of_its_own() -> None:
    pages = sorted((ROOT / "docs" / "adr").glob("*.md"))
    numbers = [int(page.name[:4]) for page in pages]
    assert len(set(numbers)) == len(numbers)
    assert numbers == [int(re.match(r"# (\d+)\. ", page.read_text())[1]) for page in pages]  # type: ignore[index]


def test_every_setting_says_whether_it_changes_compiled_code() -> None:
    found = sections()
    assert "CacheConfig" in {section.__name__ for section in found}
    assert {section.__name__: unclassified(section) for section in found} == {s.__name__: [] for s in found}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_has_no_flag_twice(name: str) -> None:
    with group.make_context("max", [name, "--help"], resilient_parsing=True) as context:
        command = group.get_command(context, name)
    assert command is not None
    counts = Counter(flag for option in command.params for flag in (*option.opts, *option.secondary_opts))
    assert not [flag for flag, count in counts.items() if count > 1]


@pytest.mark.parametrize("name", ["", *sorted(COMMANDS)])
def test_help_loads_no_heavy_library(name: str) -> None:
    code = (
        "import sys; from max.cli.main import run; code = run(sys.argv[1:]); "
        f"sys.exit(code or ' '.join(sorted(set(sys.modules) & {HEAVY!r})) or 0)"
    )
    arguments = [*([name] if name else []), "--help"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd="/"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: max {name}".rstrip())


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_modules_of_an_architecture_exist(name: str) -> None:
    row = ARCHITECTURES[name]
    for module in (row.config_module, row.model_module):
        assert importlib.util.find_spec(module, "max.models") is not None, module
