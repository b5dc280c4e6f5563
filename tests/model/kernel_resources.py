"""What each kernel takes of an H100 or H200, found without one: prints a JSON object for each stage.

The operation is called forward and backward as always, on one image of the real size, but what it
would launch is compiled for compute capability 9.0 by Triton's own ptxas instead, and never run.

    python tests/model/kernel_resources.py bf16
"""

import inspect
import json
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
    float: "fp32", int: "i32",
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The module, channels, side, towers, and whether the ReLU comes first.
STAGES = {
    "paper-1": (triton_pool, 96, 55, 1, True),
    "paper-2": (triton_pool, 256, 27, 1, True),
    "code2012-1": (triton_pool, 96, 55, 2, False),
    "code2012-2": (triton_spatial, 256, 27, 2, True),
}
resources: dict[str, dict[str, int]] = {}


class Compiled:
    """Stands for `wrap_triton`: a launch compiles."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, _grid):
        return self

    def __call__(self, *args, **kwargs):
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
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            command = [TOOLS / "cuobjdump", "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        resources[self.kernel.fn.__name__] = {
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "spilled_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
            "shared_bytes": compiled.metadata.shared,
            "loads": len(re.findall(r"ld\.global", compiled.asm["ptx"])),
        }


def main(dtype: str) -> None:
    triton_pool.wrap_triton = triton_spatial.wrap_triton = Compiled
    for name, (kernels, channels, side, towers, relu_first) in STAGES.items():
        x = torch.empty(1, channels, side, side, dtype=DTYPES[dtype], requires_grad=True)
        kernels.normalise_and_pool(x, 1e-4, towers, relu_first)[0].sum().backward()
        print(json.dumps({"stage": name, **resources}))
        resources.clear()


main(*sys.argv[1:])
