"""Image towers in native code, in every instruction set of this machine, against plain float64 NumPy."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from zsad.export.agreement import token_cosines
from zsad.export.native_tower import NativeTower
from zsad.export.native_weights import save_native_tower
from zsad.export.onnx_export import export_onnx
from zsad.export.options import NATIVE, WINDOWS, ExportOptions
from zsad.export.state_dict import CheckpointError
from zsad.export.transformer import Block
from zsad.export.vision_transformer import CLIP, DINOV2, DINOV3, VisionTransformer
from zsad.export.vit_graph import check_options
from zsad.kernels import reference
from zsad.kernels.cpu.native import _cpu

if _cpu is None:
    pytest.skip("installed without a compiler: the native code is not there", allow_module_level=True)

SETS = _cpu.instruction_sets("image_tower")
OPTIONS = ExportOptions((0, 1), 70, outputs=("tokens", "embedding"), attention=NATIVE, heads=2)


def random_tower(
    seed: int, width: int, registers: int = 0, gated: bool = False, hidden: int = 0, **own: Any
) -> VisionTransformer:
    """Three blocks of patches 10 pixels wide; keys share a large vector, and a channel is far larger than others."""
    rng = np.random.default_rng(seed)

    def affine(outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
        weight = rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)
        return weight.astype(np.float32), rng.normal(size=outputs).astype(np.float32)

    def norm() -> tuple[np.ndarray, np.ndarray]:
        return tuple(rng.normal(1, 0.3, size=width).astype(np.float32) for _ in range(2))

    hidden = hidden or 2 * width + 6
    blocks = [
        Block(norm(), affine(3 * width, width), affine(width, width), norm(), affine(hidden * (1 + gated), width),
              affine(width, hidden))
        for _ in range(3)
    ]  # fmt: skip
    tower = VisionTransformer(
        architecture=DINOV2,
        patch_weight=rng.normal(size=(width, 3, 10, 10)).astype(np.float32) / 17,
        patch_bias=rng.normal(size=width).astype(np.float32),
        class_token=rng.normal(size=width).astype(np.float32),
        registers=rng.normal(size=(registers, width)).astype(np.float32),
        positions=rng.normal(size=(1 + 49, width)).astype(np.float32),
        pre_norm=None,
        blocks=blocks,
        norm=norm(),
        projection=None,
    )
    return replace(tower, **own)


def by_definition(vit: VisionTransformer, options: ExportOptions, images: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs in float64."""
    heads, side, size = check_options(vit, options), vit.patch_size, options.image_size
    grid, front, eps = size // side, 1 + len(vit.registers), vit.architecture.norm_eps
    angles = vit.angles(heads, grid) if vit.architecture.rotary else None
    gated = len(vit.blocks[0].fc1[1]) == 2 * vit.blocks[0].fc2[0].shape[1]

    def norm(x: np.ndarray, affine: Any) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt(centred.var(axis=-1, keepdims=True) + eps) * affine[0] + affine[1]

    def through(x: np.ndarray, depth: int, angles: Any) -> list[np.ndarray]:
        streams = [x]
        for block in vit.blocks[:depth]:
            kind = "swiglu" if gated else options.activation
            streams.append(reference.transformer_block(streams[-1], vars(block), heads, kind, eps, angles))
        return streams[1:]

    def vector(x: np.ndarray) -> np.ndarray:
        normed = norm(x[0], vit.class_norm)
        return normed if vit.projection is None else normed @ vit.projection

    found: dict[str, list[Any]] = {name: [] for name in ("tokens", "embedding", "patches", *WINDOWS)}
    for image in images.astype(np.float64):
        cells = image.reshape(3, grid, side, grid, side).transpose(1, 3, 0, 2, 4).reshape(grid * grid, -1)
        x = cells @ vit.patch_weight.reshape(vit.width, -1).T + (0 if vit.patch_bias is None else vit.patch_bias)
        positions = np.zeros((1 + grid * grid, vit.width)) if vit.architecture.rotary else vit.positions
        x = np.concatenate([vit.class_token[None] + positions[:1], vit.registers, x + positions[1:]])
        x = x if vit.pre_norm is None else norm(x, vit.pre_norm)
        for name, window in WINDOWS.items():
            found[name].append([])
            for y, x0 in np.ndindex(*2 * [grid - window + 1] if name in options.outputs else (0, 0)):
                own = [front + row * grid + x0 + i for row in range(y, y + window) for i in range(window)]
                found[name][-1].append(vector(through(x[[*range(front), *own]], len(vit.blocks), None)[-1]))
        streams = through(x, options.depth(len(vit.blocks)), angles)
        taps = [(norm(x, vit.norm) if vit.architecture.normed_taps else x)[front:] for x in streams]
        found["tokens"].append([taps[tap] for tap in options.taps])
        if streams:
            found["patches"].append(norm(streams[-1], vit.norm)[front:])
            whole = vector(streams[-1])
            found["embedding"].append(whole if vit.projection is None else whole / np.linalg.norm(whole))
    return {name: np.array(found[name]) for name in options.outputs}


def native(vit: VisionTransformer, options: ExportOptions, folder: Path, exact: Any = (), **how: Any) -> NativeTower:
    save_native_tower(folder / "tower", vit, options, exact, {})
    return NativeTower(folder / "tower", **how)


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(count, 3, 70, 70)).astype(np.float32)


NORM = (np.full(48, 0.5, np.float32), np.full(48, 0.1, np.float32))
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"width": 48}, {}),
    "narrow heads, several outputs": ({"width": 40}, {"outputs": ("tokens", "embedding", "patches"), "taps": (1, 2)}),
    "wide heads, registers": ({"width": 256, "registers": 4}, {"taps": (0,)}),
    "only the class token behind the last block": ({"width": 48}, {"outputs": ("embedding",), "taps": ()}),
    "gated": ({"width": 48, "gated": True}, {"taps": (0, 2), "outputs": ("tokens",)}),
    "rotary": ({"width": 48, "architecture": DINOV3, "registers": 2}, {}),
    "windows, registers": (
        {"width": 40, "registers": 2},
        {"outputs": ("tokens", "embedding", "windows_2", "windows_3"), "taps": (0,)},
    ),
    "layers of many inputs": ({"width": 40, "hidden": 1100}, {"taps": (1,)}),
    "windows alone": ({"width": 48}, {"outputs": ("windows_3",), "taps": ()}),
    "windows of gated blocks": ({"width": 48, "gated": True}, {"outputs": ("tokens", "windows_2"), "taps": (1,)}),
    "clip": (
        {
            "width": 48,
            "architecture": CLIP,
            "pre_norm": NORM,
            "patch_bias": None,
            "projection": np.eye(48, 20, dtype=np.float32),
        },
        {"activation": "quick_gelu", "outputs": ("tokens", "embedding", "windows_2")},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("instruction_set", SETS)
def test_a_tower_equals_the_definition(instruction_set: str, case: str, tmp_path: Path) -> None:
    tower, own = CASES[case]
    vit, options, images = random_tower(1, **tower), replace(OPTIONS, **own), random_images(2)
    expected = by_definition(vit, options, images)
    for precision, exact in (("fp32", ()), ("int8", ()), ("int8", ("block0.fc1", "block1.qkv"))):
        ready = native(vit, replace(options, precision=precision), tmp_path, exact, instruction_set=instruction_set)
        found = ready.run(images)
        assert list(found) == list(options.outputs)
        for name, array in expected.items():
            assert found[name].shape == array.shape, name
            assert found[name].dtype == np.float32
            assert found[name].shape[1:] == ready.outputs[name]
            if precision == "fp32":
                assert np.linalg.norm(found[name] - array) <= 1e-6 * np.linalg.norm(array)
            else:
                assert token_cosines(found[name], array).min() > 0.9985
                assert np.linalg.norm(found[name] - array) <= 0.03 * np.linalg.norm(array)


@pytest.mark.parametrize("instruction_set", SETS)
def test_a_token_that_all_look_at_hides_none_of_the_others(instruction_set: str, tmp_path: Path) -> None:
    """Its weight is a thousand times any other's, but it has no value, and what is seen is what the others have."""
    vit = random_tower(2, 48)
    block = vit.blocks[0]
    weight, bias = (part.copy() for part in block.qkv)
    weight[:], bias[:96] = 0, 0
    bias[[0, 24]] = 5.0
    vit.class_token[:] = 0
    vit.class_token[3], vit.positions[0] = 40, 0
    block.norm1[0][3], block.norm1[1][3] = 1, 0  # makes sqrt(47) of its channel 3, and about 0 of the others'
    weight[[48, 72], 3] = np.log(1000) / 5 * np.sqrt(24 / 47)
    bias[96:] *= 25
    weight[96:, 3] = -bias[96:] / np.sqrt(47)
    vit = replace(vit, blocks=[replace(block, qkv=(weight, bias)), *vit.blocks[1:]])
    options, images = replace(OPTIONS, taps=(0,), outputs=("tokens",)), random_images(1)
    expected = by_definition(vit, options, images)["tokens"]
    found = native(vit, replace(options, precision="int8"), tmp_path, instruction_set=instruction_set).run(images)
    assert token_cosines(found["tokens"], expected).min() > 0.9998


@pytest.mark.parametrize("sharpness", [0.1, 1, 3])
@pytest.mark.parametrize("instruction_set", SETS)
def test_weights_of_hundreds_of_keys_are_small_and_large(
    instruction_set: str, sharpness: float, tmp_path: Path
) -> None:
    """From queries that see all keys nearly alike to those that see few of them."""
    positions = np.random.default_rng(6).normal(size=(1 + 17 * 17, 48)).astype(np.float32)
    vit = random_tower(7, 48, positions=positions)
    weight, bias = (part.copy() for part in vit.blocks[0].qkv)
    weight[:48], bias[:48] = weight[:48] * sharpness, bias[:48] * sharpness
    vit = replace(vit, blocks=[replace(vit.blocks[0], qkv=(weight, bias)), *vit.blocks[1:]])
    options = replace(OPTIONS, image_size=170, taps=(0,), outputs=("tokens",), precision="int8")
    images = np.random.default_rng(5).normal(size=(1, 3, 170, 170)).astype(np.float32)
    found = native(vit, options, tmp_path, instruction_set=instruction_set).run(images)["tokens"]
    assert token_cosines(found, by_definition(vit, options, images)["tokens"]).min() > 0.9999


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_images_are_independent_of_the_batch_and_of_threads(precision: str, tmp_path: Path) -> None:
    images = random_images(5)
    options = replace(OPTIONS, precision=precision, outputs=("tokens", "embedding", "patches", *WINDOWS))
    projection = np.random.default_rng(4).normal(size=(48, 20)).astype(np.float32)
    ready = native(random_tower(3, 48, projection=projection), options, tmp_path, threads=1)
    together = ready.run(images)
    for threads in (2, 7):
        other = NativeTower(tmp_path / "tower", threads=threads)
        for found in (other.run(images), other.run(images[3:]), other.run(images[4:])):
            for name, array in found.items():
                np.testing.assert_array_equal(array, together[name][-len(array) :])
    assert [len(array) for array in ready.run(images[:0]).values()] == 5 * [0]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_arrays_are_used_where_they_lie_in_the_file(precision: str, tmp_path: Path) -> None:
    native(random_tower(3, 48), replace(OPTIONS, precision=precision), tmp_path)
    content = (tmp_path / "tower").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__")
    assert not [name for name, array in header.items() if (start + array["data_offsets"][0]) % 64]
    assert load(content).keys() == header.keys()


WITHOUT_THREADS = """
import pathlib, resource, sys, threading, numpy, psutil
from zsad.export.native_tower import NativeTower
tower, images = NativeTower(pathlib.Path(sys.argv[1]), threads=3), numpy.load(sys.argv[2])
room = psutil.Process().memory_info().vms + resource.getrlimit(resource.RLIMIT_STACK)[0] // 4
resource.setrlimit(resource.RLIMIT_AS, (room, room))
try:
    threading.Thread(target=print).start()
except RuntimeError:
    numpy.save(sys.argv[3], tower.run(images)["tokens"])
else:
    sys.exit("there was room for another thread's stack")
"""


@pytest.mark.slow
def test_one_thread_does_the_work_where_the_system_gives_no_more(tmp_path: Path) -> None:
    images = random_images(2)
    np.save(tmp_path / "images.npy", images)
    expected = native(random_tower(3, 48), OPTIONS, tmp_path, threads=1).run(images)["tokens"]

    def with_large_stacks() -> None:
        most = resource.getrlimit(resource.RLIMIT_STACK)[1]
        stack = 1 << 30 if most == resource.RLIM_INFINITY else min(1 << 30, most)
        resource.setrlimit(resource.RLIMIT_STACK, (stack, most))

    files = [tmp_path / name for name in ("tower", "images.npy", "tokens.npy")]
    subprocess.run([sys.executable, "-c", WITHOUT_THREADS, *files], check=True, preexec_fn=with_large_stacks)
    np.testing.assert_array_equal(np.load(tmp_path / "tokens.npy"), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp16"}, "natively there are fp32 and int8 with heads up to 128 wide"),
        ({"image_size": 71}, "no multiple of the patch size"),
    ],
)
def test_what_is_not_to_be_had_natively_is_refused(
    random_dinov2: Any, workplace: None, change: dict[str, Any], message: str
) -> None:
    options = replace(ExportOptions((0, 1), 70, precision="int8", attention=NATIVE), **change)
    with pytest.raises(CheckpointError, match=message):
        export_onnx(str(random_dinov2()), options)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_exported_tower_agrees_with_its_graph(random_dinov2: Any, workplace: None, precision: str) -> None:
    outputs = ("tokens", "embedding", "windows_2")
    options = ExportOptions((0, 1), 70, outputs=outputs, precision=precision, attention=NATIVE)
    model = export_onnx(str(random_dinov2()), options)
    assert f"{precision} against the fp32 graph" in model.agreement
    assert not export_onnx(str(random_dinov2()), options).built
    assert tuple(NativeTower(model.path).outputs) == outputs
