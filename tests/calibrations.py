"""What a doctor may have measured, for tests to change."""

from tools.diagnosing.forecast import Calibration

MEASURED = Calibration(
    processes=1,
    device="CPU",
    precision="fp32",
    notes=["a note"],
    start_seconds=5.0,
    loader=1000.0,
    net=110.0,
    plain_net=None,
    training=100.0,
    slowest=90.0,
    fastest=105.0,
    step_seconds=1.28,
    verdict="compute-bound",
    evaluation_seconds=2.0,
    checkpoint_bytes=10**8,
    checkpoint_delay=0.5,
    checkpoint_seconds=3.5,
    memory_bytes=2 * 10**9,
    gpu_memory=None,
)
