"""Moments in what a device does. A GPU comes to them later than the host, which has gone on to queue work."""

import time
from collections import deque

import torch

STEPS_AHEAD = 2  # of the host: enough for a GPU that is never idle


class Moment:
    """The one at which a device will have done all that it has been given until now; on a CPU, now."""

    def __init__(self, device: torch.device):
        self._event = None
        if device.type == "cuda":
            # Blocking: the decoder's threads can use the core on which the host would spin.
            self._event = torch.cuda.Event(enable_timing=True, blocking=True)
            self._event.record()
        self._time = time.monotonic()

    def wait(self) -> None:
        """Hold up the host until it has come."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: "Moment") -> float:
        """By the device's clock; both have come."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return earlier._event.elapsed_time(self._event) / 1e3


class Lead:
    """The host's, over the device. What it has queued holds memory, the decoded batches most of all, so it
    waits once it is STEPS_AHEAD steps ahead."""

    def __init__(self, device: torch.device):
        self.device = device
        self._ends: deque[Moment] = deque()

    def hold(self) -> None:
        """Begin a step: wait for the end of the one STEPS_AHEAD before it."""
        self._ends.append(Moment(self.device))
        if len(self._ends) == STEPS_AHEAD:
            self._ends.popleft().wait()
