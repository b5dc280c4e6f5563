"""Reading Caffe's bvlc_alexnet from an ONNX file, and comparing the net with ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.bvlc_alexnet import INPUT_MEAN, NAMES, BvlcAlexNet, from_caffe
from pipeline.retry import read_with_retries
from trainer.settings import SettingsError

_LAYERS = "Conv Relu LRN MaxPool " * 2 + "Conv Relu " * 3 + "MaxPool " + "Gemm Relu " * 2 + "Gemm"
_WITHOUT_WEIGHTS = {"Constant", "Dropout", "Flatten", "Identity", "Reshape", "Softmax"}
_TOLERANCE = 1e-4  # relative to the largest logit: fp32 sums in a different order


def read_caffe(path: Path) -> tuple[dict[str, Tensor], int]:
    """Return the weights for BvlcAlexNet, and the crop in pixels.

    Raises ValueError if the file holds something else, SettingsError if a package is missing, and OSError.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401 – for the comparison
    except ImportError as error:
        raise SettingsError(
            f"{path} needs {error.name}, which is missing: pip install 'alexnet-train[export]'"
        ) from None
    content = read_with_retries(path)
    try:
        model = onnx.load_model_from_string(content)
    except Exception:  # of the protobuf library
        raise ValueError("it is damaged, or not an ONNX file") from None
    nodes = [node for node in model.graph.node if node.op_type not in _WITHOUT_WEIGHTS]
    if [node.op_type for node in nodes] != _LAYERS.split():
        raise ValueError(f"its layers are not {_LAYERS}")
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    state: dict[str, Tensor] = {}
    for name, node in zip(NAMES, (n for n in nodes if n.op_type in ("Conv", "Gemm")), strict=True):
        if len(node.input) != 3 or not arrays.keys() >= set(node.input[1:]):
            raise ValueError(f"{name} has no weights or no biases")
        weight, bias = (torch.from_numpy(arrays[each].copy()) for each in node.input[1:])
        is_transposed = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
        state |= {f"{name}.weight": weight if is_transposed else weight.T, f"{name}.bias": bias}
    crop = _crop(model, arrays)
    converted = from_caffe(state, crop)
    _compare(model, nodes[-1].output[0], converted, crop)
    return converted, crop


def _crop(model: Any, arrays: dict[str, np.ndarray]) -> int:
    """Return the side of the square input. Raises ValueError if there is no such input."""
    inputs = [each for each in model.graph.input if each.name not in arrays]
    sides = [[side.dim_value for side in each.type.tensor_type.shape.dim] for each in inputs]
    if len(sides) != 1 or len(sides[0]) != 4 or sides[0][1] != 3 or sides[0][2] != sides[0][3]:
        raise ValueError(f"its inputs are of shape {sides}, but [1, 3, 224, 224] or similar is needed")
    return sides[0][2]


@torch.inference_mode()
def _compare(model: Any, logits: str, state: dict[str, Tensor], crop: int) -> None:
    """Compare the logits of random pixels with those of ONNX Runtime. Raises ValueError if they differ.

    This finds any other padding, stride, pooling or normalisation, and any other order of the inputs of fc6.
    """
    import onnx
    import onnxruntime

    mean = np.array(INPUT_MEAN, np.float32)[:, None, None]
    pixels = np.random.default_rng(0).integers(256, size=(1, 3, crop, crop)).astype(np.float32) - mean
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(logits))
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        bgr = np.ascontiguousarray(pixels[:, ::-1])
        names = [each.name for each in session.get_inputs() if each.shape == list(bgr.shape)]
        [expected] = session.run(None, {names[0]: bgr})
    except Exception as error:  # ONNX Runtime has an exception class for each error code
        raise ValueError(f"ONNX Runtime cannot compute it: {' '.join(str(error).split())[:200]}") from None
    net = BvlcAlexNet(len(state["fc8.bias"]), crop=crop).eval()
    net.load_state_dict(state, assign=True)
    difference = float(
        np.abs(net(torch.from_numpy(pixels)).numpy() - expected).max() / np.abs(expected).max()
    )
    if not difference <= _TOLERANCE:  # also if it is NaN
        raise ValueError(
            f"its logits of random pixels differ from those of Caffe's AlexNet by {difference:.1e} of the "
            "largest, so its normalisation, pooling or padding is another one"
        )
