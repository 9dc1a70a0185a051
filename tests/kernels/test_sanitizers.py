"""The kernels and their thread pool under sanitizers, in a C++ program without Python and XLA."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .program import COMPILER, assert_it_passes, build


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(COMPILER[0]), reason="there is no C++ compiler")
@pytest.mark.parametrize(
    ("sanitizer", "arguments"), [("address,undefined", []), ("thread", ["without-fork"])], ids=["address", "thread"]
)
def test_the_kernels_pass_under(sanitizer: str, arguments: list[str], tmp_path: Path) -> None:
    program = build(tmp_path, "-g1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    assert_it_passes(program, *arguments)
