"""The machine code that a Hopper GPU (sm_90) gets of our kernels, made without one, and what is wrong in it.

`python -m tests.machine_code` in a process of its own, where kernels are compiled and not interpreted.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import torch

LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)\s*(.*?)\s*;")


def unset_registers(code: str) -> list[str]:
    """Lines that read a uniform register which no line before them writes: whatever ran before left its content there.

    code: as `nvdisasm -c` prints it.
    """
    written: set[int] = set()
    wrong = []
    for line in code.splitlines():
        if (found := LINE.match(line)) is None:
            continue
        operation, operands = found[2], re.split(r",\s*", found[3])
        wide = 2 if ".64" in operation or ".WIDE" in operation else 1
        writes = operation[0] == "U" or operation.startswith(("R2UR", "S2UR"))
        target = re.fullmatch(r"UR(\d+)", operands[0]) if writes else None
        sources = operands[1:] if target else operands
        read = {place for source in sources for place in _read(source, wide if target else 1, operands)}
        if read - written:
            wrong.append(line.strip())
        if target:
            written.update(range(int(target[1]), int(target[1]) + wide))
    return wrong


def _read(source: str, wide: int, operands: list[str]) -> Iterator[int]:
    """A product's tiles are told by four registers; the first two are not read where one tile lies in registers."""
    for kind, number in re.findall(r"(g?desc\[)?UR(\d+)", source):
        first = int(number)
        if kind == "gdesc[":
            yield from range(first + 2 if re.fullmatch(r"R\d+", operands[1]) else first, first + 4)
        else:
            yield from range(first, first + (2 if kind else wide))


def compiled(kernel, sizes: dict[str, int | str], types: dict[str, str]) -> str:
    """types: of pointers, by name; other arguments are whole numbers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: sizes[name] for name in ("num_warps", "num_stages")}
    names = kernel.arg_names
    constants = {(names.index(name),): value for name, value in sizes.items() if name not in options}
    signature = {name: "constexpr" if name in sizes else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types}
    made = triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        disassemble = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Kernels of converted clips, whose heads are the least that a matrix product takes, in both types of TF32."""
    from longtake.attention import span_triton

    for dtype, name in ((torch.float32, "*fp32"), (torch.float16, "*fp16")):
        for kernel in (span_triton._frame_sums, span_triton._answered):
            own = ("k_ptr", "v_ptr", "q_ptr", "near_ptr", "made_ptr")
            types = {x: name if x in own else "*fp32" for x in kernel.arg_names if x.endswith("_ptr")}
            for line in unset_registers(compiled(kernel, span_triton._sizes(16, 32, dtype), types)):
                sys.exit(f"{kernel.__name__} {dtype}: {line}")


if __name__ == "__main__":
    main()
