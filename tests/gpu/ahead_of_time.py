"""Compiles the programs for GPUs that are not here, and reads from the machine code what decides their speed.

Registers, stack and the widths of loads are in a cubin for all to see; ptxas, cuobjdump and nvdisasm come with the wheel of Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


@dataclass(frozen=True)
class Machine:
    """What a program is on a GPU: registers of a thread, bytes of stack, bytes of shared memory, loads from memory by width in bits."""

    registers: int
    stack: int
    shared: int
    loads: Counter[int]
    asynchronous: Counter[int]


def compiled(program: Any, types: dict[str, str], constants: dict[str, Any], target: str, warps: int) -> Machine:
    """The program for `target`, "90" or "gfx942"; arguments without a type are None. Tensors begin at multiples of 16 bytes."""
    signature, values, attributes = {}, {}, {}
    for number, name in enumerate(program.arg_names):
        if name in types:
            signature[name] = types[name]
            if types[name].startswith("*"):
                attributes[(number,)] = [["tt.divisibility", 16]]
        else:
            signature[name], values[name] = "constexpr", constants.get(name)
    source = ASTSource(program, signature, values, attributes)
    if target.startswith("gfx"):
        found = triton.compile(source, target=GPUTarget("hip", target, 64), options={"num_warps": warps})
        return _of_amd(found)
    found = triton.compile(source, target=GPUTarget("cuda", int(target), 32), options={"num_warps": warps})
    return _of_nvidia(found)


def _of_amd(found: Any) -> Machine:
    text = found.asm["amdgcn"]
    numbers = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text))
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "short_d16": 16, "ubyte": 8}
    loads = Counter[int]()
    for name in re.findall(r"(?:global|buffer)_load_(\w+)", text):
        loads[widths[next(known for known in widths if name.startswith(known))]] += 1
    stack = int(numbers["private_segment_fixed_size"]) + int(numbers.get("vgpr_spill_count", 0))
    return Machine(int(numbers["vgpr_count"]), stack, found.metadata.shared, loads, Counter())


def _of_nvidia(found: Any) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "--dump-resource-usage", file.name)
        code = _output("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    loads, asynchronous = Counter[int](), Counter[int]()
    for name, modifiers in re.findall(r"\b(LDGSTS|LDG)((?:\.\w+)*)", code):
        width = next(
            (int(each[1:] if each[0] == "U" else each) for each in modifiers.split(".") if each in _WIDTHS), 32
        )
        (asynchronous if name == "LDGSTS" else loads)[width] += 1
    assert not re.search(r"\b(LDL|STL)\b", code) or numbers["STACK"] > 0
    stack = numbers["STACK"] + numbers["LOCAL"]
    return Machine(numbers["REG"], stack, found.metadata.shared, loads, asynchronous)


_WIDTHS = ("128", "64", "U16", "S16", "U8", "S8")


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
