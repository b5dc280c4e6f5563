"""Caffe's AlexNet, imported from an ONNX file of the shape that the ONNX model zoo publishes."""

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.spec import NetSpec
from tools import import_weights
from tools.classifying.nets import open_run
from trainer.run import Run

CONVOLUTIONS = {  # kernels, channels of each group, side, stride, padding, groups
    "conv1": (96, 3, 11, 4, 0, 1),
    "conv2": (256, 48, 5, 1, 2, 2),
    "conv3": (384, 256, 3, 1, 1, 1),
    "conv4": (384, 192, 3, 1, 1, 2),
    "conv5": (256, 192, 3, 1, 1, 2),
}
UNITS = {"fc6": (4096, 9216), "fc7": (4096, 4096), "fc8": (10, 4096)}
LRN = {"size": 5, "alpha": 1e-4, "beta": 0.75, "bias": 1.0}


def caffe_net() -> onnx.ModelProto:
    """Return Caffe's net with ten classes and random weights, for BGR input of 224×224 pixels."""
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"shape": np.array([1, 9216])}
    nodes, last = [], "data_0"

    def add(kind: str, *weights: str, **attributes: object) -> None:
        nonlocal last
        nodes.append(helper.make_node(kind, [last, *weights], [f"{kind}_{len(nodes)}"], **attributes))
        last = nodes[-1].output[0]

    def with_weights(name: str, *shape: int) -> tuple[str, str]:
        scale = np.float32(1.4 / np.prod(shape[1:]) ** 0.5)  # outputs vary as much as inputs
        arrays[f"{name}_w"] = scale * generator.standard_normal(shape, np.float32)
        arrays[f"{name}_b"] = generator.standard_normal(shape[0], np.float32)
        return f"{name}_w", f"{name}_b"

    for name, (kernels, channels, side, stride, padding, groups) in CONVOLUTIONS.items():
        attributes = {"strides": [stride] * 2, "pads": [padding] * 4, "group": groups}
        add("Conv", *with_weights(name, kernels, channels, side, side), kernel_shape=[side] * 2, **attributes)
        add("Relu")
        if name in ("conv1", "conv2"):
            add("LRN", **LRN)
        if name in ("conv1", "conv2", "conv5"):
            add("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])
    add("Reshape", "shape")
    for name, shape in UNITS.items():
        add("Gemm", *with_weights(name, *shape), transB=1)
        if name != "fc8":
            add("Relu")
            add("Dropout")
    add("Softmax")
    pixels = helper.make_tensor_value_info("data_0", TensorProto.FLOAT, [1, 3, 224, 224])
    output = helper.make_tensor_value_info(last, TensorProto.FLOAT, [1, 10])
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "net", [pixels], [output], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=7)


@pytest.fixture(scope="module")
def net() -> onnx.ModelProto:
    return caffe_net()


@pytest.fixture
def adopt(packed, tmp_path, call) -> Callable:
    """Import a net, or the content of a file; return what the command returns."""

    def run(content: onnx.ModelProto | bytes) -> object:
        path = tmp_path / "net.onnx"
        path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
        return call(import_weights.main, path, "--out", tmp_path / "run", "--data", packed)

    return run


@pytest.mark.slow  # the file has 230 MB
def test_the_imported_net_computes_what_onnx_runtime_does_with_bgr_pixels(net, adopt, tmp_path):
    shown = adopt(net)
    assert "10 classes, 56,909,194 parameters" in shown.stdout, shown.stderr
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    spec = NetSpec.read(tmp_path / "run")
    assert (spec.crop, spec.mean) == (224, (123.0, 117.0, 104.0))
    assert Run(tmp_path / "run").settings().preset == "bvlc"
    pixels = np.random.default_rng(1).integers(256, size=(1, 3, 224, 224)).astype(np.float32)
    bgr = pixels[:, [2, 1, 0]] - np.array([104, 117, 123], np.float32)[:, None, None]
    [expected] = session.run(None, {"data_0": bgr})
    rgb = pixels - np.array(spec.mean, np.float32)[:, None, None]
    found = open_run(tmp_path / "run").probabilities(rgb[:, None])
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def changed(net: onnx.ModelProto, kind: str, **attributes: object) -> onnx.ModelProto:
    """Return the net with other attributes in its first layer of a kind."""
    other = onnx.ModelProto()
    other.CopyFrom(net)
    node = next(node for node in other.graph.node if node.op_type == kind)
    kept = [each for each in node.attribute if each.name not in attributes]
    del node.attribute[:]
    node.attribute.extend(kept + [helper.make_attribute(*each) for each in attributes.items()])
    return other


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "attributes", "reason"),
    [
        ("LRN", {"alpha": 5e-4}, "its logits of random pixels differ from those of Caffe's AlexNet by"),
        ("MaxPool", {"pads": [1, 1, 0, 0]}, "its logits of random pixels differ"),
    ],
)
def test_a_net_that_computes_something_else_is_refused(kind, attributes, reason, net, adopt, tmp_path):
    shown = adopt(changed(net, kind, **attributes))
    assert f"{tmp_path / 'net.onnx'} is not Caffe's AlexNet in ONNX: {reason}" in shown.stderr
    assert shown.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def without_normalisation() -> bytes:
    nodes = [helper.make_node(kind, ["x"], ["x"]) for kind in ("Conv", "Relu", "MaxPool")]
    return helper.make_model(helper.make_graph(nodes, "net", [], [])).SerializeToString()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x89PNG", "it is damaged, or not an ONNX file"),
        (b"", "its layers are not Conv Relu LRN MaxPool"),
        (without_normalisation(), "its layers are not Conv Relu LRN MaxPool"),
    ],
    ids=["picture", "empty", "without normalisation"],
)
def test_a_file_of_something_else_is_refused(content, reason, adopt):
    shown = adopt(content)
    assert f"is not Caffe's AlexNet in ONNX: {reason}" in shown.stderr
    assert shown.stderr.count("\n") == 1
