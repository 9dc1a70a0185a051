"""What is installed: an sdist builds a wheel with every folder, data file and kernel; the tested versions are exact."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from max.compiler.native import HANDLERS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="the kernels are built where a C++ compiler is")
FOLDERS = {"bench", "cache", "cli", "compiler", "models", "runtime", "serve"}


def packages_in_tree() -> set[str]:
    """Every folder of the package that holds an __init__.py."""
    found = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")}
    return {"max", *(".".join(["max", *path.relative_to(ROOT).parts]) for path in found)}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, made from a copy: an earlier build's leftovers would otherwise be packed again."""
    work = tmp_path_factory.mktemp("sdist")
    leave_out = shutil.ignore_patterns(
        ".git", ".venv*", ".*_cache", "__pycache__", "build", "dist", "*.egg-info", "*.so"
    )
    shutil.copytree(ROOT, work / "source", ignore=leave_out)
    build = f"import setuptools.build_meta as backend; backend.build_sdist({str(work)!r})"
    _run([sys.executable, "-c", build], work / "source")
    return next(work.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> zipfile.ZipFile:
    """A wheel built from the sdist, as an install from it would."""
    _pip([], ["wheel", "--no-build-isolation", "--wheel-dir", str(sdist.parent), str(sdist)], sdist.parent)
    return zipfile.ZipFile(next(sdist.parent.glob("*.whl")))


def _pip(options: list[str], arguments: list[str], folder: Path) -> None:
    command, *rest = arguments
    _run([sys.executable, "-m", "pip", *options, command, "--no-deps", "--no-index", *rest], folder)


def _run(command: list[str], folder: Path) -> str:
    environ = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONSAFEPATH": "1"}
    environ.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_folder_is_a_declared_package() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_in_tree()
    top = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert top == FOLDERS


def test_the_wheel_holds_every_source_file_and_nothing_else_of_the_tree(wheel: zipfile.ZipFile) -> None:
    sources = {path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    sources |= {path.name for path in ROOT.glob("*.py")} - {"setup.py"}
    packed = {name.removeprefix("max/") for name in wheel.namelist() if name.endswith(".py")}
    assert packed == sources


def test_the_wheel_holds_types_the_built_in_model_and_the_licence(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    builtin = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    assert {"max/py.typed", *(f"max/models/builtin/{name}" for name in builtin)} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    packed = wheel.read("max/models/builtin/model.safetensors")
    assert packed == (ROOT / "models/builtin/model.safetensors").read_bytes()
    assert sum(entry.compress_size for entry in wheel.infolist()) < 20e6


@needs_compiler
def test_the_wheel_holds_the_kernels(wheel: zipfile.ZipFile) -> None:
    assert [name for name in wheel.namelist() if re.fullmatch(r"max/compiler/_kernels\.cpython-.*\.so", name)]


@needs_compiler
def test_the_kernels_show_their_calls_and_no_name_of_their_insides(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Other names might be taken from, or by, another library of the process that has them too."""
    kernels = wheel.extract(next(name for name in wheel.namelist() if name.endswith(".so")), tmp_path)
    listed = _run(["nm", "--dynamic", "--defined-only", "--format=posix", kernels], tmp_path).splitlines()
    names = {line.split()[0] for line in listed}
    ours = {name for name in names if not re.match("_Z.*St", name)}  # those of C++ itself are everybody's
    assert set(HANDLERS) < ours
    assert all(re.fullmatch(r"max_kernels_\w+", name) for name in ours - set(HANDLERS)), ours - set(HANDLERS)


@pytest.fixture(scope="module")
def one_source(sdist: Path) -> Path:
    """The sources with the shortest of the kernels' files alone."""
    with tarfile.open(sdist) as packed:
        packed.extractall(sdist.parent / "one", filter="data")
    folder = next((sdist.parent / "one").iterdir())
    for path in (folder / "compiler" / "kernels").glob("*.cpp"):
        if path.name != "lazy_zeros.cpp":
            path.unlink()
    return folder


def _build_kernels(source: Path, into: Path, *compilers: str, **environ: str) -> tuple[int, str, bool]:
    """Compiles as an install does where there are `compilers`: (exit status, output, whether a library is there)."""
    programs = into / "bin"
    programs.mkdir()
    for name, of in (*((name, "c++") for name in compilers), ("as", "as"), ("ld", "ld")):
        (programs / name).symlink_to(shutil.which(of) or "")
    folders = ["--build-lib", str(into / "lib"), "--build-temp", str(into / "objects")]
    command = [sys.executable, "setup.py", "build_ext", *folders]
    done = subprocess.run(
        command, cwd=source, env={"PATH": str(programs), **environ}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr, any(into.glob("lib/max/compiler/_kernels.*"))


@needs_compiler
@pytest.mark.parametrize(
    ("compilers", "named", "built"),
    [((), {}, False), (("g++",), {}, True), (("clang++",), {}, True), (("c++",), {"CXX": "icpx"}, False),
     (("mine",), {"CXX": "mine"}, True)],
    ids=["none", "g++", "clang++", "absent", "named"],
)  # fmt: skip
def test_any_compiler_will_do_and_none_leaves_the_kernels_out(
    one_source: Path, tmp_path: Path, compilers: tuple[str, ...], named: dict[str, str], built: bool
) -> None:
    code, output, found = _build_kernels(one_source, tmp_path, *compilers, **named)
    assert (code, found) == (0, built), output
    assert ("Install g++ or clang++" in output) is not built


@needs_compiler
def test_an_error_of_the_compiler_fails_the_install(one_source: Path, tmp_path: Path) -> None:
    source = shutil.copytree(one_source, tmp_path / "source")
    (source / "compiler" / "kernels" / "lazy_zeros.cpp").write_text("#error broken\n")
    code, output, found = _build_kernels(source, tmp_path, "g++")
    assert code != 0 and "broken" in output and not found


def test_the_sdist_holds_what_the_kernels_are_compiled_from(sdist: Path) -> None:
    with tarfile.open(sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    kernels = ROOT / "compiler" / "kernels"
    assert {f"compiler/kernels/{path.name}" for path in kernels.iterdir() if path.suffix in (".cpp", ".h")} <= names
    assert {"setup.py", "Makefile", "constraints.txt", "bench/peers/README.md", ".ci/run"} <= names


@pytest.mark.slow
def test_what_an_sdist_installs_finds_its_kernels_and_generates(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """In an environment of its own, to which the dependencies alone are lent: not this checkout."""
    _run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "own")], tmp_path)
    python = str(tmp_path / "own" / "bin" / "python")
    site = Path(_run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    _pip(["--python", python], ["install", str(wheel.filename)], tmp_path)
    ask = "import max; from max.compiler.native import library; print(max.__file__, library() is not None)"
    assert _run([python, "-c", ask], tmp_path).split() == [
        str(site / "max" / "__init__.py"),
        str(bool(shutil.which("c++"))),
    ]
    command = [str(tmp_path / "own" / "bin" / "max"), "generate", "--prompt", "robot:", "--max-new-tokens", "4"]
    small = ["--max-batch-size", "1", "--max-batch-input-tokens", "4", "--cache-dir", str(tmp_path / "cache")]
    assert _run([*command, *small], tmp_path).strip()


def test_the_wheel_has_the_command(wheel: zipfile.ZipFile) -> None:
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "max = max.cli.main:main" in wheel.read(entry).decode()


def constraints(name: str) -> dict[str, str]:
    """name -> version of a file of constraints, whose lines hold nothing else."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    wrong = [line for line in lines if not re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][0-9a-z.+]*", line)]
    assert not wrong
    pinned = dict(line.split("==") for line in lines)
    assert list(pinned) == sorted(pinned) and len(pinned) == len(lines)
    return pinned


def test_constraints_allow_what_the_project_asks_for() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for_devices = [line for extra in ("cuda", "cuda-run", "rocm", "tpu") for line in extras[extra]]
    others = [line for extra in extras.values() for line in extra if line not in for_devices]
    wanted = [*PROJECT["project"]["dependencies"], *others, *PROJECT["build-system"]["requires"]]
    for file, lines in (("constraints.txt", wanted), ("constraints-targets.txt", for_devices)):
        pinned = constraints(file)
        for requirement in map(Requirement, lines):
            version = pinned.get(canonicalize_name(requirement.name))
            assert version and requirement.specifier.contains(version), f"{requirement} against {version}"


def test_what_devices_need_is_not_installed_by_default() -> None:
    assert not constraints("constraints.txt").keys() & constraints("constraints-targets.txt").keys()


def test_the_wheel_holds_the_data_on_targets(wheel: zipfile.ZipFile) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("compiler/targets/specs/*.toml")}
    assert len(files) == 4 and {f"max/{name}" for name in files} <= set(wheel.namelist())
