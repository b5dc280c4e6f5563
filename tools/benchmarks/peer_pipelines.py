"""The pipelines of `loader_peers.py`, each set up as its own documentation recommends, using all cores.

All do the same work: they decode a JPEG, take a random crop or, if the job says so, a random resized crop,
mirror it with probability ½, and normalise it to float32 on the job's device, in endless batches in random
order. Each uses a GPU as its documentation
shows: all copy from pinned memory, DALI decodes on it, and timm, DALI, SPDL and FFCV normalise on it. The
datasets measured are small, so epochs are made long wherever the end of one would empty the queues. If a
pipeline cannot read tars, it gets files or its own format, prepared in advance and not measured.

    pytorch     DataLoader with processes, torchvision's ImageFolder and transforms, as in PyTorch's examples
    timm        create_loader, which takes the same crop if area and aspect ratio are fixed
    webdataset  resampled shards, shuffled in a buffer, decoded by Pillow, batched in WebLoader's processes
    dali        readers.webdataset and DALIGenericIterator, decoding only the crop, in threads
    spdl        a pipeline of threads, one batch each, decoding with FFmpeg
    litdata     StreamingDataset over chunks of the same JPEG bytes
    streaming   MosaicML's StreamingDataset over MDS shards of the same JPEG bytes
    ffcv        a .beton of JPEGs, recompressed at quality 90 because FFCV cannot take bytes, in threads
"""

import io
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tools.benchmarks.peer_job import Job

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # for pixels from 0 to 1
LONG_EPOCH = 1_000_000  # samples, about ImageNet's

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # images [N,3,crop,crop] in any layout, labels [N]


def import_torchvision() -> None:
    """Make torchvision importable with PyTorch's CPU build as well.

    Its wheels on PyPI are built for CUDA, so their operators do not load with a CPU build. The import fails
    without two of them, which are declared here and never used.
    """
    try:
        import torchvision
    except RuntimeError:
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "() -> ()")
        import torchvision  # noqa: F401


def make_transform(job: Job) -> Callable[[Any], torch.Tensor]:
    """Return the transform of a PIL image, as in PyTorch's ImageNet example."""
    import_torchvision()
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.RandomResizedCrop(job.crop, job.scale, job.ratio)
            if job.resized_crops
            else transforms.RandomCrop(job.crop),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _workers(job: Job) -> dict[str, Any]:
    """Return DataLoader's arguments for workers and memory."""
    return {"num_workers": job.threads, "persistent_workers": True, "pin_memory": job.on_gpu}


def _delivered(loader: Iterable[Any], job: Job) -> Batches:
    """Yield a DataLoader's batches on the job's device; batches for a GPU are already in pinned memory."""
    for images, labels in _endless(loader):
        yield images.to(job.device, non_blocking=True), labels.to(job.device, non_blocking=True)


def pytorch(job: Job) -> Batches:
    transform = make_transform(job)
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision.datasets import ImageFolder

    job.files()
    images = ImageFolder(str(job.scratch / "files"), transform)
    sampler = RandomSampler(images, replacement=True, num_samples=LONG_EPOCH)
    loader = DataLoader(images, job.batch, sampler=sampler, drop_last=True, **_workers(job))
    yield from _delivered(loader, job)


def timm(job: Job) -> Batches:
    import_torchvision()
    from timm.data import create_dataset, create_loader

    job.files()
    yield from _endless(
        create_loader(
            create_dataset("", root=str(job.scratch / "files"), is_training=True),
            input_size=(3, job.crop, job.crop),
            batch_size=job.batch,
            is_training=True,
            scale=job.scale,
            ratio=job.ratio,
            color_jitter=None,
            num_workers=job.threads,
            use_multi_epochs_loader=True,
            pin_memory=job.on_gpu,
            device=torch.device(job.device),
        )
    )


def webdataset(job: Job) -> Batches:
    transform = make_transform(job)
    from webdataset import WebDataset, WebLoader

    samples = WebDataset(job.tars, resampled=True, shardshuffle=False).shuffle(1000).decode("pil")
    batches = samples.to_tuple("jpg", "cls").map_tuple(transform).batched(job.batch, partial=False)
    loader = WebLoader(batches, batch_size=None, **_workers(job))
    yield from _delivered(loader, job)


def dali(job: Job) -> Batches:
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

    from tools.benchmarks.dali_peers import webdataset_reader

    @pipeline_def(batch_size=job.batch, num_threads=job.threads, device_id=0 if job.on_gpu else None)
    def graph() -> tuple:
        jpeg, digits = webdataset_reader(job.tars)
        device = "mixed" if job.on_gpu else "cpu"
        if job.resized_crops:
            pixels = fn.decoders.image_random_crop(
                jpeg, device=device, random_area=job.scale, random_aspect_ratio=job.ratio
            )
            pixels = fn.resize(pixels, size=(job.crop, job.crop))
        else:
            pixels = fn.decoders.image_crop(
                jpeg,
                device=device,
                crop=(job.crop, job.crop),
                crop_pos_x=fn.random.uniform(range=(0.0, 1.0)),
                crop_pos_y=fn.random.uniform(range=(0.0, 1.0)),
            )
        pixels = fn.crop_mirror_normalize(
            pixels,
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * mean for mean in MEAN],
            std=[255 * std for std in STD],
            mirror=fn.random.coin_flip(),
        )
        labels = fn.pad(digits)  # label text, padded to equal length
        return pixels, labels.gpu() if job.on_gpu else labels

    outputs, drop = ["data", "label"], LastBatchPolicy.DROP
    iterator = DALIGenericIterator(
        graph(), outputs, reader_name="reader", auto_reset=True, last_batch_policy=drop
    )
    yield from ((batch["data"], batch["label"]) for [batch] in _endless(iterator))


def spdl(job: Job) -> Batches:
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    import_torchvision()
    from torchvision.transforms import RandomResizedCrop

    files, size = job.files(), job.size
    whole = torch.empty(1, size, size)
    mean, std = (torch.tensor(x, device=job.device).mul(255).view(3, 1, 1) for x in (MEAN, STD))

    def source() -> Iterator[tuple[str, int]]:
        while True:
            yield from random.sample(files, len(files))

    def frame(path: str) -> Any:
        top, left, height, width = RandomResizedCrop.get_params(whole, list(job.scale), list(job.ratio))
        mirror = "hflip," if random.random() < 0.5 else ""
        resized = f"scale={job.crop}:{job.crop}," if job.resized_crops else ""
        filters = f"crop={width}:{height}:{left}:{top},{resized}{mirror}format=pix_fmts=rgb24"
        return spdl.io.decode_packets(spdl.io.demux_image(path), filter_desc=filters)

    def decoded(samples: list[tuple[str, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        paths, labels = zip(*samples, strict=True)
        frames = spdl.io.convert_frames([frame(path) for path in paths])
        return spdl.io.to_torch(frames).permute(0, 3, 1, 2), torch.tensor(labels)

    def normalised(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = batch
        return pixels.contiguous().float().sub_(mean).div_(std), labels

    builder = PipelineBuilder().add_source(source()).aggregate(job.batch)
    builder = builder.pipe(decoded, concurrency=job.threads)
    if job.on_gpu:
        builder = builder.pipe(spdl.io.transfer_tensor_h2d, executor=ThreadPoolExecutor(1))
    builder = builder.pipe(normalised, concurrency=job.threads).add_sink(2)
    pipeline = builder.build(num_threads=job.threads)
    with pipeline.auto_stop():
        yield from pipeline


def chunk(sample: tuple[bytes, int]) -> dict[str, Any]:
    return {"image": sample[0], "class": sample[1]}


def opened(jpeg: bytes) -> Any:
    """Decode with Pillow, as torchvision's ImageFolder does."""
    from PIL import Image

    return Image.open(io.BytesIO(jpeg)).convert("RGB")


def litdata(job: Job) -> Batches:
    transform = make_transform(job)
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    samples, chunks = list(job.samples()), str(job.scratch / "chunks")
    optimize(fn=chunk, inputs=samples, output_dir=chunks, num_workers=job.threads, chunk_bytes="64MB")

    def decoded(sample: dict[str, Any]) -> tuple[torch.Tensor, int]:
        return transform(opened(sample["image"])), sample["class"]

    images = StreamingDataset(chunks, transform=decoded, subsample=LONG_EPOCH / len(samples), drop_last=True)
    how = {"multiprocessing_context": "fork"} | _workers(job)
    loader = StreamingDataLoader(images, batch_size=job.batch, shuffle=True, **how)
    yield from _delivered(loader, job)


def streaming(job: Job) -> Batches:
    transform = make_transform(job)
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    class Images(StreamingDataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(index)
            return transform(opened(sample["image"])), sample["class"]

    shards = str(job.scratch / "mds")
    with MDSWriter(out=shards, columns={"image": "bytes", "class": "int"}) as writer:
        for jpeg, label in job.samples():
            writer.write({"image": jpeg, "class": label})
    images = Images(local=shards, shuffle=True, batch_size=job.batch, epoch_size=LONG_EPOCH)
    loader: DataLoader = DataLoader(images, job.batch, drop_last=True, **_workers(job))
    yield from _delivered(loader, job)


def ffcv(job: Job) -> Batches:
    import_torchvision()
    import numpy as np
    from ffcv import transforms as ops
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Normalize

    job.files()
    images, beton = ImageFolder(str(job.scratch / "files")), str(job.scratch / "train.beton")
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=90), "label": IntField()}
    DatasetWriter(beton, fields, num_workers=job.threads).from_indexed_dataset(images)
    crop = RandomResizedCropRGBImageDecoder((job.crop, job.crop), scale=job.scale, ratio=job.ratio)
    mean, std = 255 * np.array(MEAN), 255 * np.array(STD)
    image = [crop, ops.RandomHorizontalFlip()]
    label = [IntDecoder(), ops.ToTensor(), ops.Squeeze()]
    if job.on_gpu:
        to_device = ops.ToDevice(torch.device(job.device), non_blocking=True)
        normalise = Normalize(mean.tolist(), std.tolist())  # FFCV's own needs CuPy on a GPU
        image += [ops.ToTensor(), to_device, ops.ToTorchImage(), ops.Convert(torch.float32), normalise]
        label.append(to_device)
    else:
        image += [ops.NormalizeImage(mean, std, np.float32), ops.ToTensor(), ops.ToTorchImage()]
    loader = Loader(
        beton,
        batch_size=job.batch,
        num_workers=job.threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        indices=np.resize(np.arange(len(images)), LONG_EPOCH),
        pipelines={"image": image, "label": label},
    )
    yield from _endless(loader)


# Each pipeline, with the packages on which its figures depend.
PEERS: dict[str, tuple[Callable[[Job], Any], tuple[str, ...]]] = {
    "pytorch": (pytorch, ("torch", "torchvision", "pillow")),
    "timm": (timm, ("timm", "torch", "torchvision", "pillow")),
    "webdataset": (webdataset, ("webdataset", "torch", "torchvision", "pillow")),
    "dali": (dali, ("nvidia-dali-cuda130", "torch")),
    "spdl": (spdl, ("spdl-core", "spdl-io", "torch")),
    "litdata": (litdata, ("litdata", "torch", "torchvision", "pillow")),
    "streaming": (streaming, ("mosaicml-streaming", "torch", "torchvision", "pillow")),
    "ffcv": (ffcv, ("ffcv", "numba", "torch")),
}
