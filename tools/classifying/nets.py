"""A trained net to use, from a run folder or from an export, for which nothing of the trainer is imported."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.files import naming
from pipeline.spec import NAME, NetSpec, SpecError

BATCH = 32  # inputs of a forward pass


class NetError(ValueError):
    """A net that cannot be used; the message says which and what to do."""


class Net(NamedTuple):
    """logits: of inputs [n,3,crop,crop] in fp32, as the spec says, to [n,classes]."""

    logits: Callable[[np.ndarray], np.ndarray]
    spec: NetSpec

    def probabilities(self, views: np.ndarray) -> np.ndarray:
        """[n,views,3,crop,crop] → [n,classes], averaging the views' softmax (section 4.1)."""
        flat = views.reshape(-1, *views.shape[2:])
        logits = [self.logits(flat[start : start + BATCH]) for start in range(0, len(flat), BATCH)]
        return softmax(np.concatenate(logits)).reshape(*views.shape[:2], -1).mean(1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in fp64."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def open_export(path: Path) -> Net:
    """A file of tools/export.py. Raises NetError, or OSError where it cannot be read."""
    openers = {".onnx": open_onnx, ".pt2": open_pt2}
    if path.suffix not in openers:
        raise NetError(f"{path}: a net is an .onnx or a .pt2, as tools/export.py makes them")
    if not path.is_file():
        raise NetError(f"no net at {path}: alexnet-train export RUN --out {path}")
    try:
        return openers[path.suffix](path)
    except SpecError as error:
        raise NetError(f"{error}. Export it again: alexnet-train export RUN --out {path}") from None


def open_onnx(path: Path) -> Net:
    """By ONNX Runtime, with what of its hardware is installed. Raises NetError or SpecError."""
    try:
        import onnxruntime
    except ImportError:
        raise NetError(f"{path} needs ONNX Runtime: pip install 'alexnet-train[export]'") from None
    try:
        session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    except Exception as error:  # a class of its own for each code of the C++ library
        raise NetError(f"{path} is not a net: {str(error).splitlines()[0]}") from None
    spec = NetSpec.parse(session.get_modelmeta().custom_metadata_map.get(NAME, ""), path)
    name = session.get_inputs()[0].name
    return Net(lambda pixels: session.run(None, {name: pixels})[0], spec)


def open_pt2(path: Path) -> Net:
    """By PyTorch, on the CPU. Raises NetError, SpecError or OSError."""
    import torch

    extra = {NAME: ""}
    try:
        with naming(path), open(path, "rb") as file:
            module = torch.export.load(file, extra_files=extra).module()
    except OSError:
        raise
    except Exception as error:  # whatever a broken archive makes torch raise
        raise NetError(f"{path} is not a net: {str(error).splitlines()[0]}") from None
    spec = NetSpec.parse(extra[NAME], path)

    @torch.inference_mode()
    def logits(pixels: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(pixels)).numpy()

    return Net(logits, spec)


def open_run(folder: Path, best: bool = False) -> Net:
    """The newest checkpoint of a run, or the best, in fp32, on the GPU if there is one. Raises NetError or
    OSError."""
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
