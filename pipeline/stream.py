"""Feed requests to a DALI pipeline, and yield its batches as torch tensors."""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, cycle
from typing import Any, NamedTuple
from weakref import WeakMethod

import numpy as np
import torch

from pipeline.checked import CheckedReader
from pipeline.graph import GraphOptions, find_undecodable, jpeg_batch
from pipeline.manifest import DatasetError
from pipeline.reader import JpegFiles, OutageError
from pipeline.remote_errors import reason_in_full

Batch = tuple[torch.Tensor, torch.Tensor]


class DecodingMemoryError(DatasetError):
    """There is too little memory to decode a batch, on the GPU or the CPU."""


class Request(NamedTuple):
    """A batch to load.

    samples: their numbers. inputs: those of the graph that follow the files. rest: the arguments, besides its
    output, of what is done after it.
    """

    samples: np.ndarray
    inputs: tuple[np.ndarray, ...] = ()
    rest: tuple[np.ndarray, ...] = ()


def in_turn(streams: "list[Stream]") -> Iterator[Batch]:
    """Yield a batch of each stream in turn, until one of them ends.

    Parts of DALI's work on a batch keep only one thread busy; other pipelines use the others meanwhile.
    """
    for batches in cycle([iter(stream) for stream in streams]):
        try:
            yield next(batches)
        except StopIteration:
            return


def as_tensor(pixels: Any) -> torch.Tensor:
    """Return a graph's output as a tensor, without a copy."""
    # HWC in memory with a CHW shape is torch's channels_last format.
    return torch.from_dlpack(pixels.as_tensor()).movedim(-1, -3)


class Stream:
    """Feeds requests to a DALI pipeline and yields its batches.

    build(source, options) makes the pipeline. requests() yields the requests of one iteration. persistent:
    whether the next iteration uses the same pipeline. make_cropper() returns, for an iteration, a function of
    the pipeline's output and of `rest` that makes the pixels; without it, the output is the pixels.
    """

    look_ahead = 1024  # samples to prefetch into the page cache before DALI asks for them

    def __init__(
        self,
        build: Callable[[Callable, GraphOptions], Any],
        options: GraphOptions,
        checked: CheckedReader,
        requests: Callable[[], Iterator[Request]],
        device: torch.device,
        persistent: bool = False,
        make_cropper: Callable[[], Callable[..., torch.Tensor]] | None = None,
    ):
        self.build, self.options, self.device, self.persistent = build, options, device, persistent
        self.checked, self.reader = checked, checked.reader
        self.all_requests, self.make_cropper = requests, make_cropper
        self.failure: DatasetError | None = None
        # Given to DALI, which has not returned them.
        self.in_flight: deque[tuple[Request, JpegFiles]] = deque()
        self.samples = np.array([], np.int64)  # numbers of those in the batch that was yielded last
        # DALI does not copy its inputs, and on a GPU it reads them even after it has returned the batch.
        self.inputs: deque[tuple] = deque(maxlen=options.decoding.prefetch + 2)
        self.pipeline = self._build()

    def __iter__(self) -> Iterator[Batch]:
        device = self.device
        self.requests, self.failure = self._prefetched(self.all_requests()), None
        self.in_flight.clear()
        # The requests refer to self. If self also referred to a running pipeline, or to a cropper, only the
        # garbage collector would end their threads.
        pipeline, self.pipeline = self.pipeline or self._build(), None
        crop = self.make_cropper() if self.make_cropper else as_tensor
        while True:
            # On a GPU the outputs are ordered on torch's stream, so the host does not wait for them.
            stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
            refusal = None
            try:
                [output] = pipeline.run(stream)
            except StopIteration:
                if self.failure is not None:
                    raise self.failure from None
                if self.persistent:
                    pipeline.reset()
                    self.pipeline = pipeline
                return
            except RuntimeError as error:
                refusal = str(error)
            if refusal is not None:
                pipeline = None  # frees its memory; it cannot be used again
                self._exclude_undecodable(refusal)
                self.requests = chain([request for request, _ in self.in_flight], self.requests)
                self.in_flight.clear()
                pipeline = self._build()
                continue
            request, _ = self.in_flight.popleft()
            self.samples = request.samples
            labels = torch.from_numpy(self.reader.rows["label"][self.samples].astype(np.int64))
            yield crop(output, *request.rest), labels.to(device, non_blocking=True)

    def _build(self) -> Any:
        method = WeakMethod(self._source)  # or the pipeline and self would keep each other alive

        def source() -> tuple:
            call = method()
            assert call is not None  # an iterator of self keeps it alive
            return call()

        return self.build(source, self.options)

    def _prefetched(self, requests: Iterator[Request]) -> Iterator[Request]:
        """Yield the requests, and have the kernel prefetch the samples of later ones meanwhile.

        The kernel does many reads at a time, whereas this process waits for one read after another.
        """
        waiting: deque[Request] = deque()
        samples, once = 0, self.reader.fits_in_page_cache
        for request in requests:
            numbers = request.samples
            self.reader.prefetch(self.checked.unread(numbers) if once else numbers)
            waiting.append(request)
            samples += len(numbers)
            while samples - len(waiting[0].samples) >= self.look_ahead:
                samples -= len(waiting[0].samples)
                yield waiting.popleft()
        yield from waiting

    def _source(self) -> tuple:
        """Return DALI's next inputs."""
        samples = np.array([], np.int64)
        while not samples.size:
            try:
                request = next(self.requests)
                samples, files = self.checked.read(request.samples)
            except (DatasetError, OSError) as error:
                self.failure = _as_dataset_error(error)  # raised once the batches before it have been yielded
                raise StopIteration from None
        self.in_flight.append((request._replace(samples=samples), files))
        self.inputs.append((jpeg_batch(files.jpegs), *request.inputs))
        return self.inputs[-1]

    def _exclude_undecodable(self, refusal: str) -> None:
        """Exclude the samples in flight that DALI cannot decode, after it refused a batch with this message.

        Raises DecodingMemoryError if none is at fault.
        """
        numbers = [number for request, _ in self.in_flight for number in request.samples.tolist()]
        jpegs = [jpeg for _, files in self.in_flight for jpeg in files.jpegs]
        sizes = self.reader.rows[["width", "height"]][numbers].tolist()
        try:
            at_fault = find_undecodable(jpegs, sizes, self.options)
        except MemoryError:  # there is too little even for the plain images that it compares with
            at_fault = []
        if not at_fault:
            raise DecodingMemoryError(
                "DALI cannot decode a batch of intact images, probably because memory is short. Use a "
                f"smaller batch, or end other programs. DALI says: {' '.join(refusal.split())}"
            )
        for index in at_fault:
            self.checked.exclude_undecodable(numbers[index])


def _as_dataset_error(error: DatasetError | OSError) -> DatasetError:
    if isinstance(error, DatasetError):
        return error
    reason = reason_in_full(error, "the dataset")
    return OutageError(f"{reason}. Fix the cause and run the same command again")
