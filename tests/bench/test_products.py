"""Counts of products: of single operators, of the tower whose arithmetic is known, and those that are kept."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from zsad.bench import random_weights
from zsad.bench.products import count_preset, count_products, read_products
from zsad.bench.roofline import PRESETS
from zsad.engine.config import load_config
from zsad.engine.methods.method import graph_requests, method_class
from zsad.export import state_dict


def counted(node: onnx.NodeProto, shape: list[int | str], weight: tuple[int, ...], rows: int = 1) -> tuple[float, int]:
    """Count a graph of one operator on `x` of a shape and a weight `w`."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one", [x], [y], [numpy_helper.from_array(np.zeros(weight, np.float32), "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    return count_products(SimpleNamespace(build=lambda *_: model), rows)


@pytest.mark.parametrize(
    ("operator", "shape", "weight", "attributes", "products"),
    [
        ("MatMul", ["batch", 7, 40], (40, 50), {}, 7 * 40 * 50),
        ("Gemm", [40, 7], (40, 50), {"transA": 1}, 7 * 40 * 50),
        ("Conv", ["batch", 8, 10, 10], (6, 4, 3, 3), {"group": 2, "strides": [2, 2], "pads": [1] * 4}, 25 * 6 * 4 * 9),
        ("ConvTranspose", ["batch", 8, 5, 5], (8, 3, 2, 2), {"strides": [2, 2]}, 25 * 8 * 3 * 4),
        ("Add", ["batch", 40], (40,), {}, 0),
    ],
)
def test_single_operators(
    operator: str, shape: list[int | str], weight: tuple[int, ...], attributes: dict[str, object], products: int
) -> None:
    node = helper.make_node(operator, ["x", "w"], ["y"], **attributes)
    assert counted(node, shape, weight) == (2 * products, np.prod(weight))


def test_what_rows_share_counts_once() -> None:
    node = helper.make_node("MatMul", ["w", "x"], ["y"])
    assert counted(node, ["batch", 40, 1], (5, 40), rows=3)[0] == 2 * 5 * 40
    assert counted(node, [40, 1], (5, 40), rows=4)[0] == 2 * 5 * 40 / 4


def test_a_shape_that_is_not_known_is_an_error() -> None:
    with pytest.raises(ValueError, match="a length is not known"):
        counted(helper.make_node("MatMul", ["x", "w"], ["y"]), ["batch", "tokens", 40], (40, 50))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_graphs_of_every_preset_are_kept(preset: str) -> None:
    config = load_config(preset, method_of=method_class)
    wanted = {
        (preset, request.network, request.graph): config.specs[request.network].checkpoint
        for request in graph_requests(config)
        if not request.on_demand
    }
    kept = {key: each.checkpoint for key, each in read_products().items() if key[0] == preset}
    assert kept == wanted


def test_arithmetic_of_a_large_tower() -> None:
    """As many tokens through as many blocks as a ViT-L/14 has at 518 pixels."""
    width, tokens, patches = 1024, 1370, 1369
    trunk = 24 * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width) + 2 * patches * width * 3 * 14**2
    assert read_products()["challenge", "dinov2", "image"].flops_per_row == trunk
    assert read_products()["challenge", "clip", "image"].flops_per_row == pytest.approx(trunk, rel=1e-5)


class Plain:
    """Stands in for a generator of random numbers: products are counted whatever the weights are."""

    def __init__(self, seed: int) -> None:
        pass

    def standard_normal(self, shape: Any, dtype: Any = np.float64) -> Any:
        return np.zeros(shape, dtype)

    def normal(self, loc: float, scale: float, size: Any) -> Any:
        return np.full(size, loc, np.float32)

    uniform = normal


@pytest.mark.long
@pytest.mark.parametrize("preset", ["small", "vvv"])
def test_what_is_kept_is_what_is_counted(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "default_rng", Plain)
    files: dict[Path, dict[str, NDArray[Any]]] = {}  # which would take gigabytes

    def save(state: dict[str, NDArray[Any]], path: Path) -> None:
        files[path] = state
        path.touch()

    monkeypatch.setattr(random_weights, "save_file", save)
    monkeypatch.setattr(state_dict, "load_file", files.__getitem__)
    assert list(count_preset(preset, tmp_path)) == [each for key, each in read_products().items() if key[0] == preset]
