"""Exports end to end: cached, verified, never half written."""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from zsad.engine.commands.export import main
from zsad.engine.networks.network import GraphRequest
from zsad.export import onnx_export
from zsad.export.agreement import check_agreement, run_graph, sample_images
from zsad.export.onnx_export import export_onnx, weights_path
from zsad.export.options import BUILDER_VERSION, ExportOptions, GraphOptions, TextOptions
from zsad.export.state_dict import CheckpointError
from zsad.export.transformer_graph import TransformerGraph
from zsad.kernels.files import file_sha256

OPTIONS = ExportOptions(taps=(0, 1), image_size=70)
TORCH = "torch" if importlib.util.find_spec("torch") else "graph"


@pytest.fixture(autouse=True)
def cache(empty_cache: Path) -> Path:
    return empty_cache


@pytest.mark.slow
def test_export_is_cached_by_weights_and_options(random_dinov2: Callable[..., Path], cache: Path) -> None:
    checkpoint = str(random_dinov2())
    first = export_onnx(checkpoint, OPTIONS)
    assert first.built
    assert not export_onnx(checkpoint, OPTIONS).built
    changes = [
        {"taps": (1,)},
        {"image_size": 84},
        {"activation": "quick_gelu"},
        {"heads": 2},
        {"outputs": ("tokens",)},
        {"precision": "fp16"},
        {"attention": "standard"},
        {"antialias": True},
        {"preprocessing": "clip"},
    ]
    models = [first, *(export_onnx(checkpoint, replace(OPTIONS, **change)) for change in changes)]
    assert all(model.built for model in models)
    assert set((cache / "models").glob("*.onnx")) == {model.path for model in models}
    assert len({model.path for model in models}) == len(models)


@pytest.mark.slow
def test_a_damaged_graph_in_the_cache_is_built_again(
    random_dinov2: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 1000)
    checkpoint = str(random_dinov2())
    graph = export_onnx(checkpoint, OPTIONS).path
    weights = weights_path(graph)
    assert not export_onnx(checkpoint, OPTIONS).built
    contents = graph.read_bytes(), weights.read_bytes()
    for damage in (
        lambda: graph.write_bytes(b""),
        lambda: graph.write_bytes(contents[0][:-1]),
        lambda: weights.write_bytes(contents[1][:-1]),
        lambda: graph.write_bytes(_one_bit_flipped(contents[0])),
        lambda: weights.write_bytes(_one_bit_flipped(contents[1])),
        weights.unlink,
        lambda: graph.with_name(graph.name + ".json").write_bytes(b"\xff"),
    ):
        damage()
        assert export_onnx(checkpoint, OPTIONS).built
        assert (graph.read_bytes(), weights.read_bytes()) == contents
        assert not export_onnx(checkpoint, OPTIONS).built
    assert caplog.messages == 6 * [f"{graph}: damaged since it was built; it is built anew"]


def _one_bit_flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x40]) + content[middle + 1 :]


FAST = [("fp32", {}, 98), ("fp16", {"registers": 4}, 98), ("int8", {"gated": True}, 70)]


@pytest.mark.parametrize(
    ("precision", "variant", "image_size"),
    [
        pytest.param(*how, marks=() if how in FAST else pytest.mark.slow)
        for how in itertools.product(("fp32", "fp16", "int8"), ({}, {"gated": True}, {"registers": 4}), (70, 98))
    ],
)
def test_every_export_is_compared(
    random_dinov2: Callable[..., Path], precision: str, variant: dict[str, int], image_size: int
) -> None:
    options = replace(OPTIONS, precision=precision, image_size=image_size)
    model = export_onnx(str(random_dinov2(**variant)), options, oracle=TORCH)
    assert model.agreement.startswith(f"{precision} against {'PyTorch' if TORCH == 'torch' else 'the fp32 graph'}")


@pytest.mark.parametrize(
    ("activation", "antialias"),
    [
        pytest.param("gelu", None, marks=pytest.mark.slow),
        pytest.param("gelu", True, marks=pytest.mark.slow),
        pytest.param("quick_gelu", None, marks=pytest.mark.slow),
        ("quick_gelu", True),
    ],
)
def test_clip_is_compared(golden: Path, activation: str, antialias: bool | None) -> None:
    options = ExportOptions((3, 11), 126, activation, heads=2, antialias=antialias)
    assert export_onnx(str(golden / "clip_vit_tiny.safetensors"), options, oracle=TORCH).agreement


@pytest.mark.parametrize("oracle", ["graph", TORCH])
def test_a_graph_that_computes_something_else_is_not_written(
    golden: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, oracle: str
) -> None:
    def scaled(self: TransformerGraph, x: str, kind: str, name: str) -> str:
        wrong = 1.001 if self.fused else 1.0
        return self.node("Mul", [x, self.constant(np.float32(wrong), name + ".wrong")], name)

    monkeypatch.setattr(TransformerGraph, "activation", scaled)
    with pytest.raises(CheckpointError, match="computes something else"):
        export_onnx(str(golden / "dinov2_vit_tiny.safetensors"), replace(OPTIONS, heads=3), oracle=oracle)
    assert not list((cache / "models").iterdir())


@pytest.mark.parametrize("wrong", [{"taps": (2,)}, {"taps": (1, 0)}, {"image_size": 71}, {"heads": 7}])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_options_that_do_not_fit_are_refused_before_anything_is_compared(
    random_dinov2: Callable[..., Path], wrong: dict[str, Any], precision: str
) -> None:
    with pytest.raises(CheckpointError, match=r"must be increasing|no multiple|do not divide"):
        export_onnx(str(random_dinov2()), replace(OPTIONS, precision=precision, **wrong), oracle=TORCH)


def test_agreement_has_limits_and_refuses_nan() -> None:
    tokens = np.random.default_rng(0).normal(size=(1, 2, 5, 8)).astype(np.float32)
    noise = np.random.default_rng(1).normal(size=tokens.shape).astype(np.float32)
    assert "relative error 8.7e-05" in check_agreement(
        {"tokens": tokens + 1e-4 * noise}, {"tokens": tokens}, "fp16", "itself"
    )
    for precision, size in (("fp32", 2e-4), ("fp16", 0.1), ("int8", 0.1), ("fp16", np.nan)):
        with pytest.raises(CheckpointError, match="computes something else"):
            check_agreement({"tokens": tokens + np.float32(size) * noise}, {"tokens": tokens}, precision, "itself")


def test_weights_beyond_protobuf_stand_beside_the_graph(
    random_dinov2: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "LARGEST_FILE", 1000)
    checkpoint = str(random_dinov2())
    large = export_onnx(checkpoint, OPTIONS, tmp_path / "out" / "large.onnx")
    assert set(large.path.parent.iterdir()) == {large.path, weights_path(large.path)}
    assert large.path.stat().st_size < weights_path(large.path).stat().st_size / 4
    assert large.path.stat().st_mode == weights_path(large.path).stat().st_mode
    images = {"images": sample_images(70)}
    outputs = run_graph(large.path, images)
    monkeypatch.undo()
    small = export_onnx(checkpoint, OPTIONS, large.path)
    assert list(large.path.parent.iterdir()) == [small.path]  # without the weights of the former
    found = run_graph(small.path, images)
    assert list(found) == ["tokens", "embedding"]
    for name, output in found.items():
        np.testing.assert_array_equal(output, outputs[name])


def test_a_checkpoint_is_not_replaced_by_its_graph(random_dinov2: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, content = random_dinov2(), random_dinov2().read_bytes()
    (tmp_path / "link.onnx").symlink_to(checkpoint)
    for output in (checkpoint, tmp_path / "link.onnx"):
        with pytest.raises(OSError, match="is what is to be read"):
            export_onnx(str(checkpoint), OPTIONS, output)
    assert checkpoint.read_bytes() == content


def test_metadata_says_what_is_in_the_file(random_dinov2: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = random_dinov2()
    model = export_onnx(str(checkpoint), replace(OPTIONS, precision="fp16", preprocessing="clip"), tmp_path / "m.onnx")
    facts = {entry.key: entry.value for entry in onnx.load(model.path).metadata_props}
    assert facts == {
        "architecture": "dinov2",
        "taps": "0,1",
        "activation": "gelu",
        "image_size": "70",
        "grid": "5",
        "precision": "fp16",
        "attention": "fused",
        "checkpoint": checkpoint.name,
        "checkpoint_sha256": file_sha256(checkpoint),
        "preprocessing": "clip",
        "builder_version": str(BUILDER_VERSION),
    }


@pytest.mark.slow
def test_command_exports_a_checkpoint(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tiny.onnx"
    checkpoint = str(golden / "dinov2_vit_tiny.pth")
    arguments = ["--checkpoint", checkpoint, "--taps", "1,3", "--image-size", "70", "--output", str(output)]
    assert main([*arguments, "--heads", "3", "--precision", "int8"]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(output)
    assert "int8 against" in printed.err
    onnx.checker.check_model(str(output))
    assert main(arguments) == 2  # heads of a 48-wide tower cannot be guessed
    assert "--heads" in capsys.readouterr().err
    for wrong in (["--checkpoint", checkpoint], [*arguments, "--batch", "1,2"], [*arguments, "--taps", "a"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)


def test_command_exports_a_preset(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every network with the options of its preset, named after it."""
    made = []

    def fake(checkpoint: str, options: GraphOptions, output: Path, *_: object) -> onnx_export.ExportedModel:
        made.append((checkpoint, options, output))
        return onnx_export.ExportedModel(
            output, checkpoint, "", options.precision, "imagenet", inputs={}, built=True, agreement="fine"
        )

    monkeypatch.setattr("zsad.export.onnx_export.export_onnx", fake)
    monkeypatch.setattr("zsad.export.checkpoints.fetch_checkpoint", lambda name: None)
    arguments = ["--preset", "challenge", "--precision", "fp16", "--output", str(tmp_path)]
    assert main([*arguments, "--batch", "1,8,32", "--device", "0"]) == 0  # as they are anyway
    taps = (5, 11, 17, 23)
    assert made == [
        (
            "dinov2-vitl14",
            ExportOptions(taps, 518, outputs=("tokens",), precision="fp16", preprocessing="imagenet"),
            tmp_path / "dinov2-518-fp16.onnx",
        ),
        (
            "clip-vitl14-336",
            ExportOptions(taps, 518, precision="fp16", preprocessing="imagenet"),
            tmp_path / "clip-518-fp16.onnx",
        ),
    ]
    made.clear()
    assert main(["--preset", "musc", "--image-size", "336"]) == 0
    assert made == [("clip-vitl14-336", ExportOptions(taps, 336, preprocessing="clip"), None)]
    made.clear()
    requests = [GraphRequest("clip", "image", ("windows_2",)), GraphRequest("clip", "text", ("embedding",))]
    monkeypatch.setattr("zsad.engine.methods.method.graph_requests", lambda config: requests)
    for precision, of_texts in (("fp16", "fp16"), ("int8", "fp32")):
        assert main(["--preset", "musc", "--precision", precision, "--output", str(tmp_path)]) == 0
        assert made.pop() == (
            "clip-vitl14-336",
            TextOptions(precision=of_texts),
            tmp_path / f"clip-text-{of_texts}.onnx",
        )
        assert made.pop()[1].outputs == ("windows_2",)
    with pytest.raises(SystemExit, match="2"):
        main(["--preset", "nothing"])
    assert "there is no preset 'nothing'" in capsys.readouterr().err


def test_a_cut_checkpoint_leaves_nothing(golden: Path, tmp_path: Path, cache: Path) -> None:
    state = dict(load_file(golden / "dinov2_vit_tiny.safetensors"))
    state["blocks.1.mlp.fc1.weight"] = state["blocks.1.mlp.fc1.weight"][:, :-1].copy()
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"odd\.safetensors.*block 1 fc1 is \(192, 47\) instead of \(192, 48\)"):
        export_onnx(str(tmp_path / "odd.safetensors"), replace(OPTIONS, heads=3))
    assert not cache.exists()
