"""A slow link that all connections of a proxy share, and that tests can break."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Link:
    """A link with latency, limited bandwidth and outages.

    delay: seconds added to each request. bytes_per_second: of all connections together. sockets: the clients'
    connections that are open.
    """

    def __init__(self, delay: float, bytes_per_second: float):
        self.delay, self.bytes_per_second = delay, bytes_per_second
        self.sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._is_free_at = 0.0
        self._is_up, self._is_closing = threading.Event(), threading.Event()
        self._is_up.set()
        self._is_silent = False

    def close(self) -> None:
        """Close all connections, and end all waiting."""
        self._is_closing.set()
        self._is_up.set()
        self.cut()

    def cut(self) -> None:
        """Close all connections."""
        for connection in list(self.sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def outage(self, silent: bool = False) -> Iterator[None]:
        """Break the link during the block.

        Connections are reset, or, if `silent`, nothing is sent until the end of the block.
        """
        self._is_silent = silent
        self._is_up.clear()
        if not silent:
            self.cut()
        try:
            yield
        finally:
            self._is_up.set()

    def outage_for(self, seconds: float, silent: bool = False) -> threading.Thread:
        """Break the link for some seconds, in the background; return the thread, which ends with it."""

        is_broken = threading.Event()

        def break_link() -> None:
            with self.outage(silent):
                is_broken.set()
                self.pause(seconds)

        thread = threading.Thread(target=break_link, daemon=True)
        thread.start()
        is_broken.wait()
        return thread

    def pause(self, seconds: float) -> None:
        """Wait for some seconds, or until the link is closed."""
        self._is_closing.wait(seconds)

    def transmit(self, size: int) -> bool:
        """Wait until `size` bytes have passed; return False if the link is broken."""
        if not self._is_up.is_set():
            if not self._is_silent:
                return False
            self._is_up.wait()
        if self.bytes_per_second < float("inf"):
            with self._lock:
                begin = max(time.monotonic(), self._is_free_at)
                self._is_free_at = begin + size / self.bytes_per_second
                wait = self._is_free_at - time.monotonic()
            self.pause(wait)
        return not self._is_closing.is_set()
