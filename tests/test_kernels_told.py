"""Kernels that are being compiled are told, and later starts find them on disk. Compiling needs no GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from longtake.cli.engines import tell_of_kernels

PROGRAM = """
from types import SimpleNamespace

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longtake.cli import engines


@triton.jit
def twice(x, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(x + at, 2 * tl.load(x + at))


engines.KernelsTold._EVERY_SECONDS = 0
engines.tell_of_kernels(SimpleNamespace(fused=True))
for n in (32, 64, 32):
    triton.compile(ASTSource(twice, {"x": "*fp32"}, {"n": n}), target=GPUTarget("cuda", 90, 32))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_kernels_are_told_as_they_are_compiled_and_a_second_start_compiles_none(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    surroundings["TRITON_CACHE_DIR"] = str(tmp_path / "kernels")

    def told() -> list[str]:
        done = subprocess.run(
            [sys.executable, str(program)], env=surroundings, capture_output=True, text=True, check=True
        )
        return done.stderr.splitlines()

    waits, *kernels = told()
    assert "kernels to be compiled" in waits
    assert [line.partition(",")[0] for line in kernels] == [f"longtake: kernels compiled so far: {n}" for n in (1, 2)]
    assert kernels[-1].endswith("the last twice")
    assert told() == [waits]


def test_an_engine_without_kernels_of_its_own_tells_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    tell_of_kernels(SimpleNamespace(fused=False))  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""
