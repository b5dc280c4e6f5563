"""Events in a device's queue of work, which a GPU reaches later than the host that queued them."""

import time
from collections import deque

import torch

STEPS_AHEAD = 2  # how far the host may run ahead of the device; enough to keep a GPU busy


class DeviceEvent:
    """The event that a device has finished all work queued before it; on a CPU, that is so at once."""

    def __init__(self, device: torch.device):
        self._event = None
        if device.type == "cuda":
            # A blocking wait leaves the core to the decoder's threads; otherwise the host would spin on it.
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._event.record()
        self._time = time.monotonic()

    def wait(self) -> None:
        """Block the host until the device has reached this event."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "DeviceEvent") -> float:
        """Return the time since an earlier event by the device's clock; both must have been reached."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return earlier._event.elapsed_time(self._event) / 1e3


class RunAheadLimit:
    """Keeps the host at most STEPS_AHEAD steps ahead of the device.

    The limit saves memory, because queued steps hold their decoded batches.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._ends: deque[DeviceEvent] = deque()

    def wait(self) -> None:
        """Wait, before a step is queued, until fewer than STEPS_AHEAD steps are unfinished."""
        self._ends.append(DeviceEvent(self.device))
        if len(self._ends) == STEPS_AHEAD:
            self._ends.popleft().wait()
