"""Kernels compiled for a Hopper GPU, on any machine: what the assembler made of them can be trusted."""

import os
import platform
import subprocess
import sys

import pytest
from tests.machine_code import unset_registers


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the assembler comes for x86-64 alone")
def test_no_kernel_of_converted_clips_reads_a_register_that_nothing_wrote() -> None:
    """Some assemblers run out of uniform registers, and then take any number for a tile's address."""
    pytest.importorskip("triton", reason="triton is not installed (it comes with longtake[dev] on Linux)")
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-m", "tests.machine_code"], env=plain, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


SOUND = """
        /*0000*/                   UMOV UR6, 0x400 ;
        /*0010*/                   UMOV UR7, 0x80000020 ;
        /*0020*/                   ULDC.64 UR8, c[0x0][0x208] ;
        /*0030*/               @P0 LDG.E R2, desc[UR8][R2.64] ;
        /*0040*/                   HGMMA.64x8x8.F32.TF32 R60, R64, gdesc[UR4], R60 ;
"""


def test_what_is_read_was_written() -> None:
    assert unset_registers(SOUND) == []


@pytest.mark.parametrize(
    "line", ["UMOV UR6, 0x400", "UMOV UR7, 0x80000020", "ULDC.64 UR8, c[0x0][0x208]"], ids=["low", "high", "pair"]
)
def test_what_was_not_written_is_found(line: str) -> None:
    (wrong,) = unset_registers(SOUND.replace(line, "NOP"))
    assert wrong.endswith(("gdesc[UR4], R60 ;", "desc[UR8][R2.64] ;"))


def test_the_fault_that_was_there_is_found() -> None:
    fault = "        /*0050*/                   UIADD3 UR5, UP0, UR10, 0x2, URZ ;\n"
    assert unset_registers(SOUND + fault) == [fault.strip()]
