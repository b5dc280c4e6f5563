"""The Triton kernels as compiled for the GPU, which takes no GPU."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def has_compiler() -> bool:
    """Whether Triton is here, with NVIDIA's assembler in its wheel."""
    found = find_spec("triton")
    return found is not None and (Path(found.origin).parent / "backends/nvidia/bin/ptxas").exists()


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="Triton is not installed, or came without ptxas")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_kernels_compile_for_the_h200_and_stay_in_registers(dtype, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, Path(__file__).with_name("kernel_resources.py"), dtype]
    lines = subprocess.check_output(command, env=environment, text=True).splitlines()
    stages = {stage.pop("stage"): stage for stage in map(json.loads, lines)}
    kernels = {name: len(stage) for name, stage in stages.items()}
    assert kernels == {"paper-1": 2, "paper-2": 2, "code2012-1": 2, "code2012-2": 5}
    for stage in stages.values():
        for name, used in stage.items():
            assert used["spilled_bytes"] == 0, name
            # Of 65,536: four programs of 128 threads or more at a time, to hide the memory's latency.
            assert used["registers"] <= 128, name
            assert used["shared_bytes"] <= 8192, name
            # 16 bytes at a time: a thread's eight values are one load or two. One by one they would be eight.
            assert used["loads"] <= 48, name
