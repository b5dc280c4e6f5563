"""Opening a trained net from a run folder or an exported file.

Exported files are opened without importing the trainer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.files import path_in_errors
from pipeline.spec import NET_NAME, NetSpec, SpecError

BATCH = 32  # inputs per forward pass


class NetError(ValueError):
    """A net that cannot be used or exported; the message says why and what to do."""


class Net(NamedTuple):
    """A net. logits: maps inputs [n,3,crop,crop] in fp32, prepared as `spec` says, to logits [n,classes]."""

    logits: Callable[[np.ndarray], np.ndarray]
    spec: NetSpec

    def probabilities(self, views: np.ndarray) -> np.ndarray:
        """Map [n,views,3,crop,crop] to [n,classes], averaging the softmax over the views (section 4.1)."""
        flat = views.reshape(-1, *views.shape[2:])
        logits = [self.logits(flat[start : start + BATCH]) for start in range(0, len(flat), BATCH)]
        return softmax(np.concatenate(logits)).reshape(*views.shape[:2], -1).mean(1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Compute the softmax over the last axis, in fp64."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def open_export(path: Path) -> Net:
    """Open a file that tools/export.py wrote. Raises NetError, or OSError if it cannot be read."""
    openers = {".onnx": open_onnx, ".pt2": open_pt2}
    if path.suffix not in openers:
        raise NetError(f"{path}: not an exported net: `alexnet-train export` writes .onnx and .pt2 files")
    if not path.is_file():
        raise NetError(f"no net at {path}. Export one: alexnet-train export RUN --out {path}")
    try:
        return openers[path.suffix](path)
    except SpecError as error:
        raise NetError(f"{error}. Export it again: alexnet-train export RUN --out {path}") from None


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
        raise NetError(f"{path} is not a net: {str(error).splitlines()[0]}") from None
    spec = NetSpec.parse(session.get_modelmeta().custom_metadata_map.get(NET_NAME, ""), path)
    name = session.get_inputs()[0].name
    return Net(lambda pixels: session.run(None, {name: pixels})[0], spec)


def open_pt2(path: Path) -> Net:
    """Open a net with PyTorch, on the CPU. Raises NetError, SpecError or OSError."""
    import torch

    extra = {NET_NAME: ""}
    try:
        with path_in_errors(path), open(path, "rb") as file:
            module = torch.export.load(file, extra_files=extra).module()
    except OSError:
        raise
    except Exception as error:  # a broken archive can make torch raise anything
        raise NetError(f"{path} is not a net: {str(error).splitlines()[0]}") from None
    spec = NetSpec.parse(extra[NET_NAME], path)

    @torch.inference_mode()
    def logits(pixels: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(pixels)).numpy()

    return Net(logits, spec)


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

    return Net(logits, spec)
