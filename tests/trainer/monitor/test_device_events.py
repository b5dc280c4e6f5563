"""How far the host runs ahead of a device, for which fake events stand in."""

import pytest
import torch

from trainer.monitor.device_events import DeviceEvent, RunAheadLimit

GPU = torch.device("cuda", 0)


@pytest.fixture
def device(monkeypatch):
    """A device with the number of events `queued`, and of those `done` for which the host has waited."""

    class Device:
        queued = 0
        done = 0

    class Event:
        def __init__(self, enable_timing: bool, blocking: bool):
            assert enable_timing

        def record(self):
            self.position = Device.queued

        def synchronize(self):
            Device.done = max(Device.done, self.position)

        def elapsed_time(self, end):
            return 1000.0 * (end.position - self.position)

    monkeypatch.setattr("torch.cuda.Event", Event)
    return Device


def test_the_host_is_at_most_two_steps_ahead(device):
    run_ahead = RunAheadLimit(GPU)
    ahead = []
    for _ in range(6):
        run_ahead.wait()
        device.queued += 1  # the step
        ahead.append(device.queued - device.done)
    assert ahead == [1, 2, 2, 2, 2, 2]


def test_seconds_on_a_gpu_are_those_of_the_devices_clock(device):
    begun = DeviceEvent(GPU)
    device.queued += 3
    assert DeviceEvent(GPU).seconds_since(begun) == 3.0
    assert device.done == 0  # the host has not waited


def test_the_host_never_waits_for_a_cpu(device, monkeypatch):
    times = iter([1.0, 3.5])
    monkeypatch.setattr("trainer.monitor.device_events.time.monotonic", lambda: next(times))
    begun, done = DeviceEvent(torch.device("cpu")), DeviceEvent(torch.device("cpu"))
    done.wait()
    assert done.seconds_since(begun) == 2.5
