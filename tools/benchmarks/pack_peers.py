"""Packing with other packages, with which `alexnet-train bench pack` compares.

    .pack-peers/bin/python tools/benchmarks/pack_peers.py copy --input FOLDER --out FOLDER --workers 2

This script runs in its own environment (`make .pack-peers`), because Pillow and pillow-simd are both imported
as PIL. The last word it prints is the number of packed images.

    shardwriter  the obvious script: Pillow in a pool of processes, and webdataset's ShardWriter
    copy         ShardWriter alone, which copies the files' own bytes without decoding them
    img2dataset  img2dataset reading file:// URLs, with its own resizing by OpenCV
"""

import argparse
import json
from io import BytesIO
from multiprocessing import Pool
from pathlib import Path

SIZE, QUALITY, SHARD_SAMPLES = 256, 90, 500


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def resized(path: Path) -> bytes:
    """Return the central square of 256 px, as JPEG."""
    from PIL import Image

    image = Image.open(path).convert("RGB")
    scale = SIZE / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - SIZE) // 2 for side in image.size)
    buffer = BytesIO()
    image.crop((left, top, left + SIZE, top + SIZE)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def shardwriter(root: Path, output: Path, workers: int) -> int:
    with Pool(workers) as pool:
        return _write(files(root), pool.imap(resized, files(root), chunksize=16), output)


def copy(root: Path, output: Path, workers: int) -> int:
    return _write(files(root), map(Path.read_bytes, files(root)), output)


def _write(paths, jpegs, output: Path) -> int:
    from webdataset import ShardWriter

    labels = {name: label for label, name in enumerate(sorted({path.parent.name for path in paths}))}
    with ShardWriter(str(output / "%06d.tar"), maxcount=SHARD_SAMPLES, verbose=0) as writer:
        for number, (path, jpeg) in enumerate(zip(paths, jpegs, strict=True)):
            writer.write({"__key__": f"{number:09d}", "jpg": jpeg, "cls": labels[path.parent.name]})
    return len(paths)


def img2dataset(root: Path, output: Path, workers: int) -> int:
    from img2dataset import download

    urls = output / "urls.txt"
    urls.write_text("".join(f"{path.resolve().as_uri()}\n" for path in files(root)))
    download(
        url_list=str(urls),
        output_folder=str(output / "shards"),
        output_format="webdataset",
        number_sample_per_shard=SHARD_SAMPLES,
        processes_count=workers,
        thread_count=2 * workers,
        image_size=SIZE,
        resize_mode="center_crop",
        encode_quality=QUALITY,
    )
    stats = (json.loads(path.read_text()) for path in (output / "shards").glob("*_stats.json"))
    return sum(shard["successes"] for shard in stats)


PEERS = {"shardwriter": shardwriter, "copy": copy, "img2dataset": img2dataset}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, required=True)
    options = parser.parse_args()
    print(PEERS[options.peer](options.input, options.out, options.workers))
