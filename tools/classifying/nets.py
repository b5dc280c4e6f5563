"""Open a trained net from a run folder or an exported file.

Exported files are opened without importing the trainer.
"""

import logging
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np

from pipeline.files import path_in_errors
from pipeline.spec import NET_NAME, NetSpec, SpecError

BATCH = 32  # inputs per forward pass
_ORT_PREFIX = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .* failed:)?(/\S+:\d+ .*\) )?")


class NetError(ValueError):
    """A net that cannot be used or exported; the message says why and what to do."""


class Net(NamedTuple):
    """A net. logits: maps inputs [n,3,crop,crop] in fp32, prepared as `spec` says, to logits [n,classes]."""

    logits: Callable[[np.ndarray], np.ndarray]
    spec: NetSpec

    def probabilities(self, views: np.ndarray) -> np.ndarray:
        """Map [n,views,3,crop,crop] to [n,classes], averaging the softmax over the views (section 4.1).

        Raises NetError if an output is infinite or not a number, as those of a net that diverged.
        """
        flat = views.reshape(-1, *views.shape[2:])
        parts = [self.logits(flat[start : start + BATCH]) for start in range(0, len(flat), BATCH)]
        logits = np.concatenate(parts)
        if not np.isfinite(logits).all():
            raise NetError("the net's outputs are not finite numbers: use another checkpoint, or another net")
        return softmax(logits).reshape(*views.shape[:2], -1).mean(1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Compute the softmax over the last axis, in fp64."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def open_export(path: Path) -> Net:
    """Open a file that tools/export.py wrote. Raises NetError, or OSError if it cannot be read."""
    openers = {".onnx": open_onnx, ".pt2": open_pt2}
    if path.suffix.lower() not in openers or path.is_dir():
        raise NetError(
            f"--net {path}: a net is an .onnx or .pt2 file, which `alexnet-train export` writes; "
            "a run folder is given with --run"
        )
    if not path.is_file():
        raise NetError(f"no net at {path}. Export one: alexnet-train export RUN --out {path}")
    if not path.stat().st_size:
        raise NetError(f"{path} is empty. {_remedy(path)}")
    try:
        return _checked(openers[path.suffix.lower()](path), path, _remedy(path))
    except SpecError as error:
        raise NetError(str(error)) from None


def _remedy(path: Path) -> str:
    return f"Export it again: alexnet-train export RUN --out {path}"


def _checked(net: Net, path: Path, remedy: str) -> Net:
    """Return the net if its outputs match its net.json. Raises NetError."""
    crop, classes = net.spec.crop, len(net.spec.classes)
    try:
        shape = net.logits(np.zeros((1, 3, crop, crop), np.float32)).shape
    except Exception as error:  # ONNX Runtime and torch have many kinds
        raise NetError(f"{path} cannot be used as its {NET_NAME} says: {_reason(error)}. {remedy}") from None
    if shape != (1, classes):
        raise NetError(
            f"{path} gives outputs of shape {list(shape[1:])}, but its {NET_NAME} names {classes} classes. "
            f"{remedy}"
        )
    return net


def _reason(error: Exception) -> str:
    """Return a library's message in one line, without ONNX Runtime's error code and source location."""
    text = " ".join(str(error).split()) or type(error).__name__
    return _ORT_PREFIX.sub("", text)[:200].rstrip(".")


def open_onnx(path: Path) -> Net:
    """Open a net with ONNX Runtime, on any hardware that its installed build supports.

    Raises NetError or SpecError.
    """
    try:
        import onnxruntime
    except ImportError:
        raise NetError(f"{path} needs ONNX Runtime: pip install 'alexnet-train[export]'") from None
    try:
        session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    except Exception as error:  # ONNX Runtime has an exception class for each error code
        raise NetError(f"{path} is not a net: {_reason(error)}. {_remedy(path)}") from None
    content = session.get_modelmeta().custom_metadata_map.get(NET_NAME)
    if content is None:
        raise NetError(f"{path} has no {NET_NAME}, so this project did not export it. {_remedy(path)}")
    spec = NetSpec.parse(content, path, _remedy(path))
    name = session.get_inputs()[0].name
    return Net(lambda pixels: session.run(None, {name: pixels})[0], spec)


def open_pt2(path: Path) -> Net:
    """Open a net with PyTorch, on the CPU. Raises NetError, SpecError or OSError."""
    spec = NetSpec.parse(_read_net_json(path), path, _remedy(path))

    import torch

    logging.getLogger("torch.export").setLevel(logging.ERROR)  # it warns before it raises
    try:
        with path_in_errors(path), open(path, "rb") as file:
            module = torch.export.load(file).module()
    except OSError:
        raise
    except Exception as error:  # a broken archive can make torch raise anything
        raise NetError(f"{path} is not a net: {_reason(error)}. {_remedy(path)}") from None

    @torch.inference_mode()
    def logits(pixels: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(pixels)).numpy()

    return Net(logits, spec)


def _read_net_json(path: Path) -> bytes:
    """Return net.json from a .pt2 file, which is a zip archive. Raises NetError or OSError."""
    try:
        with path_in_errors(path), ZipFile(path) as archive:
            found = [name for name in archive.namelist() if name.endswith(f"/extra/{NET_NAME}")]
            if found:
                return archive.read(found[0])
    except (BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise NetError(f"{path} is damaged or not a .pt2 file ({_reason(error)}). {_remedy(path)}") from None
    raise NetError(f"{path} has no {NET_NAME}, so this project did not export it. {_remedy(path)}")


def open_run(folder: Path, best: bool = False) -> Net:
    """Open the newest or the best checkpoint of a run, in fp32, on the GPU if there is one.

    Raises NetError or OSError.
    """
    from trainer.run import Run, RunError
    from trainer.settings import SettingsError

    run = Run(folder)
    try:
        settings = run.settings()
        spec = run.net(settings)

        import torch

        from trainer.evaluate import load_net

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, _, _ = load_net(settings, run, device, best)
    except (SettingsError, RunError) as error:
        raise NetError(str(error)) from None
    model.eval()

    @torch.inference_mode()
    def logits(pixels: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(pixels).to(device)).cpu().numpy()

    return _checked(Net(logits, spec), folder, "Restore its files from one copy of the run")
