"""A tiny exported net with known outputs."""

import json
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from pipeline.spec import NET_NAME

SPEC = {
    "format": 1,
    "geometry": "256",
    "size": 10,
    "crop": 8,
    "mean": [0, 0, 0],
    "classes": [{"id": f"n{n}", "name": f"class {n}"} for n in range(3)],
}


def write_onnx(path: Path, spec: str | None = json.dumps(SPEC), *, second_input: bool = False) -> Path:
    """Write a net whose three logits are the means of the three channels."""
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 8, 8])
    other = helper.make_tensor_value_info("other", TensorProto.FLOAT, ["n", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])
    nodes = [
        helper.make_node("Add", ["pixels", "other" if second_input else "pixels"], ["sum"]),
        helper.make_node("GlobalAveragePool", ["sum"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "net", [pixels, other][: 1 + second_input], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if spec is not None:
        helper.set_model_props(model, {NET_NAME: spec})
    onnx.save(model, path)
    return path
