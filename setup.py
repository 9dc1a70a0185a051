"""Compiles the CPU kernels; everything else about the package stands in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

KERNELS = Path("compiler/kernels")
# Contraction of a * b + c is the compiler's choice in each place, and rows must not depend on that.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-g0", "-pthread"]


def xla_headers() -> str:
    """The folder of XLA's FFI headers, found without importing jaxlib."""
    found = importlib.util.find_spec("jaxlib")
    if found is None or not found.submodule_search_locations:
        sys.exit("The CPU kernels need the headers in jaxlib: install jaxlib first, or build with isolation.")
    return str(Path(found.submodule_search_locations[0]) / "include")


def compiler() -> str | None:
    """The C++ compiler that will be used, if there is one."""
    named = shlex.split(os.environ.get("CXX", ""))
    return shutil.which(named[0]) if named else shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


class BuildKernels(build_ext):
    """Leaves the kernels out, loudly, where no compiler is; an error of the compiler fails the install."""

    def run(self) -> None:
        if compiler() is None:
            print(
                "warning: no C++ compiler found, so the CPU kernels are left out and models run several times slower.\n"
                "Install g++ or clang++ (Debian: apt install g++), then install this package again.",
                file=sys.stderr,
            )
            self.extensions = []
        super().run()

    def build_extensions(self) -> None:
        """Compiles one file on each core; setuptools alone would take them in turn."""
        compile_files = self.compiler.compile

        def compile_beside(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile_files([source], **options), sources)
                return [path for paths in made for path in paths]

        self.compiler.compile = compile_beside
        super().build_extensions()


class BuildSources(build_py):
    """The root is the package, but this file is no part of it."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] != ("max", "setup")]


setup(
    cmdclass={"build_ext": BuildKernels, "build_py": BuildSources},
    ext_modules=[
        Extension(
            "max.compiler._kernels",
            sources=sorted(path.as_posix() for path in KERNELS.glob("*.cpp")),
            depends=sorted(path.as_posix() for path in KERNELS.glob("*.h")),
            include_dirs=[xla_headers()],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
        )
    ],
)
