"""Print the resources that each kernel uses on an H100 or H200, without one, as a JSON object per stage.

The operation is called forward and backward as usual, on images of the real size. Its kernels are not
launched, but compiled for compute capability 9.0 by Triton's own ptxas. Instructions are the total of all
warps for one image, and bytes the total of all tensors for one image.

    python tests/model/kernel_resources.py bf16
"""

import inspect
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from model import triton_pool, triton_spatial

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8",
    float: "fp64",  # as torch.compile passes it; arithmetic with it is then in fp64
    int: "i32",
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Module, channels, side, towers, and whether the ReLU comes first.
STAGES = {
    "paper-1": (triton_pool, 96, 55, 1, True),
    "paper-2": (triton_pool, 256, 27, 1, True),
    "code2012-1": (triton_pool, 96, 55, 2, False),
    "code2012-2": (triton_spatial, 256, 27, 2, True),
}
IMAGES = 16
# The number of iterations of a kernel's loop.
TRIPS = {
    "_pool": lambda given: given["block_rows"],
    "_backward": lambda given: given["block_rows"],
    "_spatial": lambda given: given["rows"],
    "_spatial_backward": lambda given: (given["height"] + 3) // 2,
    "_local_backward": lambda given: given["block_rows"],
}
resources: dict[str, dict[str, float]] = {}


def disassembled(cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        return subprocess.check_output([TOOLS / "cuobjdump", *options, file.name], text=True)


def executed(code: str, trips: int) -> int:
    """Count the instructions that a warp executes in a kernel with at most one loop."""
    found = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?);", code, re.MULTILINE)
    lines = [(int(address, 16), text) for address, text in found if not text.startswith("NOP")]
    loop = range(0)
    for address, text in lines:
        branch = re.search(r"BRA.* 0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address and address - int(branch[1], 16) > len(loop):
            loop = range(int(branch[1], 16), address + 1)
    return sum(trips if address in loop else 1 for address, _ in lines)


class Compiled:
    """Replaces `wrap_triton`: a launch only compiles."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        self.grid = grid
        return self

    def __call__(self, *args, num_warps, **kwargs):
        given = inspect.signature(self.kernel.fn).bind(*args, **kwargs).arguments
        constants = {p.name: given[p.name] for p in self.kernel.params if p.is_constexpr}
        types = {
            name: "constexpr" if name in constants else TYPES[getattr(value, "dtype", type(value))]
            for name, value in given.items()
        }
        aligned = {
            (i,): [["tt.divisibility", 16]] for i, v in enumerate(given.values()) if isinstance(v, Tensor)
        }
        source = ASTSource(self.kernel, types, constants, aligned)
        compiled = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": num_warps})
        usage, code = (disassembled(compiled.asm["cubin"], option) for option in ("-res-usage", "-sass"))
        name = self.kernel.fn.__name__
        warps = math.prod(self.grid) * num_warps
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        resources[name] = {
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "spilled_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
            "shared_bytes": compiled.metadata.shared,
            "loads": len(re.findall(r"ld\.global", compiled.asm["ptx"])),
            "fp64": len(re.findall(r"\b(DADD|DFMA|DMUL)\b", code)),
            "instructions": warps * executed(code, TRIPS[name](given) if name in TRIPS else 1) / IMAGES,
            "bytes": sum(tensor.nbytes for tensor in tensors) / IMAGES,
        }


def main(dtype: str) -> None:
    triton_pool.wrap_triton = triton_spatial.wrap_triton = Compiled
    for name, (kernels, channels, side, towers, relu_first) in STAGES.items():
        x = torch.empty(IMAGES, channels, side, side, dtype=DTYPES[dtype], requires_grad=True)
        bias = torch.empty(channels, requires_grad=True)
        kernels.normalise_and_pool(x, bias, 1e-4, towers, relu_first)[0].sum().backward()
        print(json.dumps({"stage": name, **resources}))
        resources.clear()


main(*sys.argv[1:])
