"""Compiles the CPU kernels; everything else about the package stands in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

KERNELS = Path("compiler/kernels")
# Contraction of a * b + c is the compiler's choice in each place, and rows must not depend on that.
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-g0", "-pthread"]


def xla_headers() -> str:
    """The folder of XLA's FFI headers, found without importing jaxlib."""
    found = importlib.util.find_spec("jaxlib")
    if found is None or not found.submodule_search_locations:
        sys.exit("The CPU kernels need the headers in jaxlib: install jaxlib first, or build with isolation.")
    return str(Path(found.submodule_search_locations[0]) / "include")


def compiler() -> str | None:
    """The command of the C++ compiler that is there: of CXX, or else the one that built this Python, or else any."""
    named = os.environ.get("CXX")
    commands = [named] if named else [sysconfig.get_config_var("CXX") or "", "c++", "g++", "clang++"]
    return next((command for command in commands if command and shutil.which(shlex.split(command)[0])), None)


class BuildKernels(build_ext):
    """Leaves the kernels out, loudly, where no compiler is; an error of the compiler fails the install."""

    def run(self) -> None:
        found = compiler()
        if found is None:
            print(
                "warning: no C++ compiler found, so the CPU kernels are left out and models run several times slower.\n"
                "Install g++ or clang++ (Debian: apt install g++), or name yours in CXX, and install this again.",
                file=sys.stderr,
            )
            self.extensions = []
        else:
            os.environ["CXX"] = found  # setuptools would take the one that built this Python, which may not be here
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
