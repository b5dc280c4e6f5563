"""Points in a device's queue of work. A GPU reaches them later than the host, which runs ahead of it."""

import time
from collections import deque

import torch

STEPS_AHEAD = 2  # of the device that the host may be; enough to keep a GPU busy


class Moment:
    """The moment at which a device has finished all the work queued so far; on a CPU, this is now."""

    def __init__(self, device: torch.device):
        self._event = None
        if device.type == "cuda":
            # A blocking wait leaves the core to the decoder's threads; otherwise the host would spin on it.
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._event.record()
        self._time = time.monotonic()

    def wait(self) -> None:
        """Block the host until the device has reached this moment."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Moment") -> float:
        """Return the time since an earlier moment by the device's clock; both must have been reached."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return earlier._event.elapsed_time(self._event) / 1e3


class Lead:
    """Limits how far the host runs ahead of the device, to STEPS_AHEAD steps.

    Queued work holds memory, above all the decoded batches.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._ends: deque[Moment] = deque()

    def hold(self) -> None:
        """Begin a step: wait until the step STEPS_AHEAD before it has ended."""
        self._ends.append(Moment(self.device))
        if len(self._ends) == STEPS_AHEAD:
            self._ends.popleft().wait()
