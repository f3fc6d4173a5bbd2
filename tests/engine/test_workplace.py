"""Whole runs on a device: the real data flow, kernels as host code, no GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_checkpoints import ARRAYS, write_clip
from host_build import COMPILER, MISSING_COMPILER, HostDevice, KernelError
from host_tensorrt import HostEngine
from machines import having
from numpy.typing import NDArray
from pictures import save_pictures, touch_images
from PIL import Image
from runs import draw, record, scores_and_maps
from vvv_checkpoints import FEW, networks, stages, write_bright_isnet

from zsad.engine.commands.infer import main

needs_compiler = pytest.mark.skipif(COMPILER is None, reason=MISSING_COMPILER)


@pytest.fixture(autouse=True)
def _workplace(workplace: None) -> None:
    """Every test here runs the tiny network in a folder of its own."""


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize(
    "limit",
    [pytest.param([], marks=pytest.mark.long, id="resident"), pytest.param(["--memory-limit", "230KB"], id="spilled")],
)
def test_a_run_on_a_device_equals_one_on_the_cpu(
    two_networks: Path,
    emulated_gpu: HostDevice,
    tensorrt: list[HostEngine],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    limit: list[str],
) -> None:
    data = draw(tmp_path / "data", 11)
    (data / "05.png").write_bytes(b"no image")
    common = [str(data), "--preset", "challenge", "--config", str(two_networks), "-v"]
    assert main([*common, "--device", "cpu", "--output", "cpu"]) == 1
    assert main([*common, "--device", "cuda:0", "--batch-size", "4", "--output", "gpu", *limit]) == 1
    said = capsys.readouterr().err
    assert "tensorrt 10.14.1 on the host" in said
    assert ("are read in chunks" in said) == bool(limit)
    assert [engine.runs for engine in tensorrt] == [[4, 4, 2]] * 2
    assert emulated_gpu.recordings == 2  # of full batches of two networks
    (scores, maps), (expected, expected_maps) = scores_and_maps("gpu"), scores_and_maps("cpu")
    np.testing.assert_allclose(scores, expected, atol=0.02)
    for one, other in zip(maps, expected_maps, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02)
    assert np.argmax(scores) == 9
    assert record("gpu")["device"] == "cuda:0"
    assert record("gpu")["config"]["network_precision"] == "fp16"


@needs_compiler
@pytest.mark.parametrize(
    ("preset", "model", "references"), [("winclip", "clip_tiny", True), ("april-gan", "april", False)]
)
@pytest.mark.long
def test_text_guided_runs_on_a_device_equal_those_on_the_cpu(
    tokenizer: object,
    emulated_gpu: HostDevice,
    tensorrt: list[HostEngine],
    tmp_path: Path,
    preset: str,
    model: str,
    references: bool,
) -> None:
    size, taps = (96, [5]) if preset == "winclip" else (98, [2, 5, 8, 11])
    Path("tiny.toml").write_text(
        f'image_size = {size}\n[networks.clip]\ncheckpoint = "{write_clip(tmp_path, model)}"\ntaps = {taps}\n'
        + (f'[april_gan]\nhead = "{ARRAYS / "april_head.pth"}"\n' if preset == "april-gan" else "")
    )
    data = draw(tmp_path / "data", 3)
    # Every run has an object of its own, so that none finds text vectors in the cache.
    common = [str(data), "--preset", preset, "--config", "tiny.toml", "--object", f"nut {references}"]
    if references:
        touch_images(tmp_path, "good/0.png", "good/1.png")
        common += ["--reference", "good"]
    for device in ("cpu", "cuda:0"):
        assert main([*common, "--device", device, "--output", device]) == 0
    (scores, maps), (expected, expected_maps) = scores_and_maps("cuda:0"), scores_and_maps("cpu")
    np.testing.assert_allclose(scores, expected, atol=0.02)
    for one, other in zip(maps, expected_maps, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02)
    assert len(tensorrt) == 2  # both towers
    assert record("cuda:0")["device"] == "cuda:0"


def stage_foregrounds(output: str) -> list[NDArray[np.bool_]]:
    return [np.asarray(Image.open(path)) > 0 for path in sorted(Path(output).glob("data/stages/*-foreground.png"))]


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize(("preset", "batch"), [("vvv", "1"), ("vvv", "3"), ("winclip", "3")])
def test_foregrounds_and_tiles_on_a_device_equal_those_on_the_cpu(
    tokenizer: object,
    golden_segmentation: Path,
    emulated_gpu: HostDevice,
    tensorrt: list[HostEngine],
    tmp_path: Path,
    preset: str,
    batch: str,
) -> None:
    arrays = np.load(golden_segmentation / "sam_tiny.npz")
    save_pictures("data", arrays["image0_rgb"], arrays["image1_rgb"])
    save_pictures("good", arrays["image1_rgb"][::-1])
    Path("few.toml").write_text(FEW)
    isnet = write_bright_isnet(tmp_path / "bright.onnx", 128)
    own = networks(tmp_path) + '[vvv]\nprompts = "few.toml"\ntau = 0.1\n'
    few = ["--reference", "good"] if preset == "winclip" else []
    if preset == "winclip":
        own = f'image_size = 96\n[networks.clip]\ncheckpoint = "{write_clip(tmp_path, "clip_tiny")}"\n'
    Path("tiny.toml").write_text(own + stages(isnet, 128, foreground="coverage = 0.4", tiles="parts = 1"))
    # Every run has an object of its own, so that none finds text vectors in the cache.
    common = ["data", "--preset", preset, "--config", "tiny.toml", "--object", f"nut {batch}", "--keep-stages", *few]
    common += ["--foreground", "isnet+sam", "--components", "--batch-size", batch]
    for device in ("cpu", "cuda:0"):
        assert main([*common, "--device", device, "--output", device]) == 0
    for one, other in zip(stage_foregrounds("cuda:0"), stage_foregrounds("cpu"), strict=True):
        assert np.mean(one != other) < 1e-3  # of masks in half precision
    (scores, maps), (expected, expected_maps) = scores_and_maps("cuda:0"), scores_and_maps("cpu")
    np.testing.assert_allclose(scores, expected, atol=0.02)
    for one, other in zip(maps, expected_maps, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02)
        assert other.max() > 0.1
    # CLIP's towers, IS-Net, SAM's encoder and decoder; CLIPSeg's decoder and towers, whose texts may be in the cache.
    assert len(tensorrt) in ((7, 8) if preset == "vvv" else (5,))
    assert record("cuda:0")["device"] == "cuda:0"


@pytest.mark.slow
@needs_compiler
def test_tokens_from_the_cpu_can_be_scored_on_a_device(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    having(monkeypatch, "cupy", "gpu")
    data = draw(tmp_path / "data", 6)
    for name in ("cpu", "cuda:0"):
        arguments = [str(data), "--device", name, "--output", name, "--config", str(tiny / "config.toml")]
        assert main(arguments) == 0
    np.testing.assert_allclose(scores_and_maps("cuda:0")[0], scores_and_maps("cpu")[0], atol=0.02)
    assert record("cuda:0")["device"] == "cpu"
    assert record("cuda:0")["config"]["settings"]["precision"] == "fp16"


@pytest.mark.slow
@needs_compiler
def test_a_bank_on_a_device_equals_one_on_the_cpu(
    tiny: Path,
    emulated_gpu: HostDevice,
    tensorrt: list[HostEngine],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, data = draw(tmp_path / "good", 6), draw(tmp_path / "data", 3)
    (good / "05.png").unlink()  # the one with a defect
    saved = ["--reference", str(good), "--config", str(tiny / "config.toml"), "--bank-size", "60"]
    for device, bank in (("cpu", "cpu.zsad"), ("cuda:0", "gpu.zsad")):
        assert main([*saved, "--device", device, "--save-bank", bank]) == 0
    capsys.readouterr()
    for device, bank in (("cpu", "cpu.zsad"), ("cuda:0", "cpu.zsad"), ("cuda:0", "gpu.zsad")):
        assert main([str(data), "--bank", bank, "--device", device, "--output", f"{device} {bank}"]) == 0
    said = capsys.readouterr().err
    assert said.count("cpu.zsad: networks run in fp16 and ran in fp32 for the bank") == 1
    expected, expected_maps = scores_and_maps("cpu cpu.zsad")
    scores, maps = scores_and_maps("cuda:0 cpu.zsad")
    np.testing.assert_allclose(scores, expected, atol=0.02)
    for one, other in zip(maps, expected_maps, strict=True):
        np.testing.assert_allclose(one, other, atol=0.05)  # near 0 a distance is the root of what fp16 rounds
    np.testing.assert_allclose(scores_and_maps("cuda:0 gpu.zsad")[0], expected, atol=0.02)
    assert np.argmax(expected) == 2


@pytest.mark.slow
@needs_compiler
def test_several_devices_share_the_scoring(
    two_networks: Path, tensorrt: list[HostEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = [HostDevice(), HostDevice()]
    data = draw(tmp_path / "data", 7)
    common = [str(data), "--preset", "challenge", "--config", str(two_networks), "--device", "cuda:0,1"]
    for count in (1, 2):
        monkeypatch.setattr("zsad.kernels.cuda.device.open_devices", lambda name, count=count: devices[:count])
        assert main([*common, "--output", f"on{count}"]) == 0
    assert devices[1].launches > 0
    np.testing.assert_array_equal(scores_and_maps("on1")[0], scores_and_maps("on2")[0])


@pytest.mark.slow
@needs_compiler
def test_a_gpu_that_fails_stops_the_run_and_keeps_what_is_finished(
    two_networks: Path,
    emulated_gpu: HostDevice,
    tensorrt: list[HostEngine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in "abc":
        draw(tmp_path / "data" / name, 4)
    upload, images = emulated_gpu.upload, 0

    def fail_later(array: NDArray[Any], out: NDArray[Any]) -> None:
        nonlocal images
        images += array.dtype == np.uint8
        if images == 7:
            raise KernelError("an illegal memory access was encountered")
        upload(array, out)

    monkeypatch.setattr(emulated_gpu, "upload", fail_later)
    arguments = [str(tmp_path / "data"), "--preset", "challenge", "--config", str(two_networks), "--device", "cuda:0"]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "the GPU failed (an illegal memory access was encountered)" in said
    assert "add --resume to go on from there" in said
    assert (Path("out") / "a" / "category.json").is_file()
    assert not (Path("out") / "b").exists()
    assert main([*arguments, "--resume"]) == 0
    assert "a: already finished" in capsys.readouterr().err
