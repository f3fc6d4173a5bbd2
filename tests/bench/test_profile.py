"""Where the time goes: classes of operators, and a profile of tiny networks."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from zsad.bench import profile, runtimes, throughput
from zsad.bench.products import ATTENTION, LINEAR
from zsad.bench.profile import ACTIVATION, LAYOUT, NORMALISATION, OTHER, SOFTMAX, SUMS, WAITING, WHOLE_ATTENTION


@pytest.mark.parametrize(
    ("operator", "shapes", "kind"),
    [
        ("MatMul", [[1, 25, 64], [64, 192]], LINEAR),
        ("MatMul", [[1, 4, 25, 16], [1, 4, 16, 25]], ATTENTION),
        ("FullyConnected", [[1, 25, 64], [192, 64]], LINEAR),
        ("MultiHeadAttention", [[1, 25, 64]] * 3, WHOLE_ATTENTION),
        ("Transpose", [[1, 25, 64]], LAYOUT),
        ("Unheard", [], OTHER),
    ],
)
def test_products_of_activations_are_told_from_linear_layers(operator: str, shapes: list[list[int]], kind: str) -> None:
    assert profile.kind_of(operator, shapes) == kind


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ("block0.attention.logits,block0.attention.softmax,block0.attention.mixed", WHOLE_ATTENTION),
        ("block0.attention.softmax", SOFTMAX),
        ("block0.activation", ACTIVATION),
        ("block0.norm1", NORMALISATION),
        ("block0.residual", SUMS),
    ],
)
def test_what_is_fused_belongs_where_its_first_names_say(names: str, kind: str) -> None:
    assert profile.fused_class(names) == kind


def test_what_no_operator_takes_is_waiting() -> None:
    found = [(LINEAR, "MatMul", 1.0, 8.0), (LINEAR, "Gemm", 2.0, 4.0), (LAYOUT, "Transpose", 0.5, 2.0)]
    classes = profile.collected(iter(found), 4.0)
    assert list(classes) == [LINEAR, LAYOUT, WAITING]
    assert (classes[LINEAR].seconds, classes[LINEAR].bytes) == (3.0, 12.0)
    assert classes[LINEAR].operators == {"MatMul": 1.0, "Gemm": 2.0}
    assert classes[WAITING].seconds == 0.5


@pytest.mark.long
@pytest.mark.skipif(find_spec("openvino") is None, reason="needs OpenVINO (pip install openvino)")
def test_a_profile_of_tiny_networks(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tiny / "cache"))
    monkeypatch.setattr(profile, "SIDE", 64)
    monkeypatch.setattr(profile, "COPIED", 1000)
    monkeypatch.setattr(runtimes, "PEAK_SHAPES", ((64, 64, 64),))
    output = tmp_path / "out.jsonl"
    common = ["--config", str(tiny / "config.toml"), "--images", "4", "--repeats", "2", "--output", str(output)]
    assert throughput.main([*common, "--device", "cpu", "--profile"]) == 0
    printed, records = capsys.readouterr().out, [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert {"ONNX Runtime fp32", "ONNX Runtime int8", "OpenVINO fp32"} <= {record["variant"] for record in records}
    # 25 patches and the class token, 48 channels, 4 blocks; the patches' own product.
    linear = 4 * 2 * 12 * 48 * 48 * 26 + 2 * 3 * 14 * 14 * 48 * 25
    attention = 4 * 2 * 2 * 26 * 26 * 48
    for record in records:
        (graph,) = record["graphs"]
        counted = {name: each["flops"] for name, each in graph["classes"].items() if each["flops"]}
        if record["variant"].startswith("native"):
            assert {LINEAR, ATTENTION, SOFTMAX, NORMALISATION, LAYOUT} <= set(graph["classes"])
        else:
            assert OTHER not in graph["classes"], graph["classes"][OTHER]
        assert counted.pop(LINEAR) == linear
        assert list(counted.values()) == [attention]
        assert set(counted) <= {ATTENTION, WHOLE_ATTENTION}
        assert record["flops_of_pairs"] == 6 * 2 * 2 * 25 * 25 * 48
        assert f"{record['variant']}: preset small at 70 px, 4 images" in printed
        for line in profile.profile_rows(record):
            assert len(line) == 5
