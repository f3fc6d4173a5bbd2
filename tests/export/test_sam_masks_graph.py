"""The graph of SAM's prompt encoder and mask decoder against segment_anything's arrays and PyTorch."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from zsad.bench.random_weights import mask_decoder_state, write_states
from zsad.export.agreement import run_graph
from zsad.export.onnx_export import export_onnx
from zsad.export.options import SamMasksOptions
from zsad.export.sam import read_mask_decoder
from zsad.export.sam_masks_graph import _Graph, build_sam_masks_graph
from zsad.export.state_dict import CheckpointError

TINY = SamMasksOptions(192, heads=4)

Run = Callable[..., Mapping[str, np.ndarray]]


@pytest.fixture(scope="module")
def arrays(golden: Path) -> Mapping[str, np.ndarray]:
    return dict(np.load(golden / "segmentation" / "sam_tiny.npz"))


@pytest.fixture
def run(golden: Path, tmp_path: Path) -> Run:
    """Builds the golden checkpoint's graph and returns its outputs."""
    decoder = read_mask_decoder(golden / "segmentation" / "sam_tiny.safetensors")

    def run(embedding: np.ndarray, points: np.ndarray, options: SamMasksOptions = TINY, folded: bool = True):
        model = build_sam_masks_graph(decoder, options, folded=folded)
        onnx.checker.check_model(model, full_check=True)
        onnx.save_model(model, str(tmp_path / "masks.onnx"))
        inputs = {"embedding": embedding[None], "points": points.astype(np.float32)}
        return run_graph(tmp_path / "masks.onnx", inputs)

    return run


@pytest.mark.parametrize("image", [0, 1])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_equals_segment_anything(
    run: Run, arrays: Mapping[str, np.ndarray], image: int, precision: str, folded: bool
) -> None:
    def array(name: str) -> np.ndarray:
        return arrays[f"image{image}_{name}"]

    found = run(array("embedding"), array("points_scaled"), replace(TINY, precision=precision), folded)
    for name, expected in (("logits", array("low_res_logits")), ("iou", array("iou_predictions"))):
        assert found[name].shape == expected.shape
        relative = 1e-4 / 37 if precision == "fp32" else 3e-3  # 1e-4 in all for logits of up to 37
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=relative * np.abs(expected).max())


def test_points_do_not_see_each_other(run: Run, arrays: Mapping[str, np.ndarray]) -> None:
    embedding, points = arrays["image0_embedding"], arrays["image0_points_scaled"]
    together = run(embedding, points[:5])
    for name, output in run(embedding, points[3:4]).items():
        np.testing.assert_allclose(output[0], together[name][3], rtol=0, atol=1e-4)
    moved = run(embedding, points[:5] + np.array([8, 0]))
    assert np.abs(moved["logits"] - together["logits"]).max() > 1


@pytest.mark.parametrize("oracle", ["graph", pytest.param("torch", marks=pytest.mark.torch)])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_is_exported_beside_the_encoder(empty_cache: Path, golden: Path, precision: str, oracle: str) -> None:
    if oracle == "torch":
        pytest.importorskip("torch", reason="compares with PyTorch")
    checkpoint = str(golden / "segmentation" / "sam_tiny.safetensors")
    options = replace(TINY, precision=precision)
    model = export_onnx(checkpoint, options, oracle=oracle)
    assert model.agreement.startswith(precision)
    assert model.inputs == {"embedding": (1, 32, 12, 12), "points": (None, 2)}
    assert model.path.name.startswith("sam_tiny-masks-192-")
    assert not export_onnx(checkpoint, options).built
    graph = onnx.load(model.path)
    assert {node.domain for node in graph.graph.node} == {""}
    shapes = [
        [size.dim_value or size.dim_param for size in output.type.tensor_type.shape.dim]
        for output in graph.graph.output
    ]
    assert shapes == [["batch", 3, 48, 48], ["batch", 3]]
    assert {entry.key: entry.value for entry in graph.metadata_props}["architecture"] == "sam-masks"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "int8"}, "fp32 or fp16"),
        ({"image_size": 200}, "no multiple of 16; use --image-size 192"),
        ({"heads": 3}, "3 attention heads do not divide a width of 16"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, wrong: dict[str, object], message: str) -> None:
    decoder = read_mask_decoder(
        write_states(tmp_path / "masks.safetensors", mask_decoder_state(32, hidden=16, quality=16))
    )
    with pytest.raises(CheckpointError, match=message):
        build_sam_masks_graph(decoder, replace(TINY, **wrong))


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_published_sizes_agree(empty_cache: Path, tmp_path: Path, precision: str) -> None:
    checkpoint = write_states(tmp_path / "masks.safetensors", mask_decoder_state())
    model = export_onnx(str(checkpoint), SamMasksOptions(precision=precision))
    assert model.inputs == {"embedding": (1, 256, 64, 64), "points": (None, 2)}
    assert model.agreement.startswith(precision)


def test_a_graph_that_computes_something_else_is_not_written(
    empty_cache: Path, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _Graph.quality

    def another_token(self: _Graph, tokens: str) -> None:
        whole(self, self.cut(tokens, 1, 3, "wrong") if self.folded else tokens)

    monkeypatch.setattr(_Graph, "quality", another_token)
    with pytest.raises(CheckpointError, match="computes something else"):
        export_onnx(str(golden / "segmentation" / "sam_tiny.safetensors"), TINY)
