"""The resources of the Triton kernels, compiled for a GPU on any machine."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Instructions of all warps and bytes of all tensors for a 16-bit image; improvements lower these limits.
# The bytes are those of a stage's input and gradient, once or more, the pooled maps and the indices.
LIMITS = {
    "paper-1": {"instructions": 700_000, "bytes": 2_200_000},
    "paper-2": {"instructions": 360_000, "bytes": 1_400_000},
    "code2012-1": {"instructions": 520_000, "bytes": 2_200_000},
    "code2012-2": {"instructions": 820_000, "bytes": 4_050_000},
}


def has_compiler() -> bool:
    """Return whether Triton is installed, with NVIDIA's assembler in its wheel."""
    found = find_spec("triton")
    return found is not None and (Path(found.origin).parent / "backends/nvidia/bin/ptxas").exists()


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="Triton or its ptxas is not installed")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_kernels_compile_for_the_h200_within_their_resource_limits(dtype, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, Path(__file__).with_name("kernel_resources.py"), dtype]
    lines = subprocess.check_output(command, env=environment, text=True).splitlines()
    stages = {stage.pop("stage"): stage for stage in map(json.loads, lines)}
    kernels = {name: len(stage) for name, stage in stages.items()}
    assert kernels == {"paper-1": 2, "paper-2": 2, "code2012-1": 2, "code2012-2": 4}
    for stage_name, stage in stages.items():
        for name, used in stage.items():
            assert used["spilled_bytes"] == 0, name
            # Leaves room for ten warps in 65,536 registers, whose loads in flight hide memory latency.
            assert used["registers"] <= 200, name
            assert used["shared_bytes"] <= 8192, name
            # A thread loads its values in one or two loads, not one by one.
            assert used["loads"] <= 64, name
            assert used["fp64"] == 0, name
        if dtype != "fp32":
            for resource, limit in LIMITS[stage_name].items():
                assert sum(used[resource] for used in stage.values()) <= limit, (stage_name, resource)
