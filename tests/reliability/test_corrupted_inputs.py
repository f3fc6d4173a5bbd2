"""Corrupted files in every reader: each is read or refused in a sentence, within memory, and nothing else."""

import io
import json
import os
import random
import resource
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from corruption import corrupted, images
from onnx import TensorProto, helper
from PIL import Image
from safetensors.numpy import save as safetensors

from zsad.engine.config import ConfigError, load_config, read_toml
from zsad.engine.evaluation.evaluate import EvaluationError, evaluate
from zsad.engine.evaluation.masks import MaskError, read_mask
from zsad.engine.evaluation.saturation import CONFIG, read_saturation
from zsad.engine.images.decode import decode
from zsad.engine.images.folders import scan
from zsad.engine.images.stored import ImageError
from zsad.engine.methods.method import method_class
from zsad.engine.results.records import CategoryRecord, ImageRecord, read_record, write_record
from zsad.engine.text.prompts import SETS, read_prompts
from zsad.export.adopt import read_ready_graph
from zsad.export.options import IsnetOptions
from zsad.export.state_dict import CheckpointError, read_state_dict

pytestmark = pytest.mark.slow

CASES = int(os.environ.get("ZSAD_CASES", "100"))  # in all
SEED = int(os.environ.get("ZSAD_SEED", "0"))
MEMORY = 4 << 30  # bytes of address space beyond what the test has when it starts


def torch_archive() -> bytes:
    """An archive as torch.save writes it, of a dictionary with nothing but a number."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s.")
        archive.writestr("model/data/0", bytes(16))
    return content.getvalue()


def graph() -> bytes:
    """A ready graph: an image's channels become one."""
    shapes = ([1, 3, 64, 64], [1, 1, 64, 64])
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
        for name, shape in zip("xy", shapes, strict=True)
    )
    weights = helper.make_tensor("w", TensorProto.FLOAT, [1, 3, 1, 1], [0.1, 0.2, 0.3])
    nodes = [helper.make_node("Conv", ["x", "w"], ["z"]), helper.make_node("Sigmoid", ["z"], ["y"])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, [weights]), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    onnx.checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def evaluated(path: Path) -> None:
    """Read a corrupted table, or a corrupted map, of results beside data that is whole."""
    evaluate(path.parents[1], scan(path.parents[2] / "data"), warn=lambda _: None, note=lambda _: None)


def results(folder: Path) -> dict[Path, bytes]:
    """Lay out data and results of two images under a folder; returns the table and a map."""
    for kind in ("good", "bad"):
        place = folder / "data" / "c" / "test" / kind
        place.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(place / "0.png")
    mask = folder / "data" / "c" / "ground_truth" / "bad"
    mask.mkdir(parents=True)
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(mask / "0_mask.png")
    out = folder / "out" / "c"
    out.mkdir(parents=True)
    for name in ("good.tiff", "bad.tiff"):
        Image.fromarray(np.eye(8, dtype=np.float32)).save(out / name)
    table = "path,score,rank,raw_score,map\ntest/good/0.png,0.1,2,0.1,good.tiff\ntest/bad/0.png,0.9,1,0.9,bad.tiff\n"
    (out / "scores.csv").write_text(table)
    return {file: file.read_bytes() for file in (out / "scores.csv", out / "bad.tiff")}


Reader = Callable[[Path], object]


def readers(folder: Path) -> list[tuple[Path, bytes, Reader, tuple[type[Exception], ...]]]:
    """Return files, what is in them, what reads them, and what that may raise."""
    pictures = images()
    cases: list[tuple[Path, bytes, Reader, tuple[type[Exception], ...]]] = []
    for name, content in pictures.items():
        cases.append((folder / "images" / name, content, decode, (ImageError,)))
        cases.append((folder / "masks" / name, content, read_mask, (MaskError, ImageError)))
    tensors = {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}
    checkpoints = {"a.safetensors": safetensors(tensors), "a.pth": torch_archive(), "a.onnx": graph()}
    for name, content in checkpoints.items():
        cases.append((folder / "checkpoints" / name, content, read_state_dict, (CheckpointError,)))
    ready = folder / "graphs" / "ready.onnx"
    cases.append((ready, graph(), lambda path: read_ready_graph(path, IsnetOptions(64)).check(), (CheckpointError,)))
    config = b'image_size = 70\n[networks.dinov2]\ncheckpoint = "x"\ntaps = [1, 3]\n[musc]\ndegrees = [1, 3]\n'
    load = lambda path: load_config("small", path, method_of=method_class)  # noqa: E731
    prompts = (SETS / "april35.toml").read_bytes()
    cases += [
        (folder / "a.toml", config, load, (ConfigError,)),
        (folder / "b.toml", config, read_toml, (ConfigError,)),
        (folder / "prompts.toml", prompts, read_prompts, (ConfigError,)),
    ]
    defects = [{"defect_name": "x", "pixel_value": 255, "saturation_threshold": 3, "relative_saturation": False}]
    saturation = folder / "loco" / CONFIG
    cases.append((saturation, json.dumps(defects).encode(), lambda path: read_saturation(path.parent), (ValueError,)))
    record = folder / "category.json"
    write_record(record, CategoryRecord("c"), [ImageRecord(f"{number}.png", 0.5, 1.5) for number in range(3)])
    cases.append((record, record.read_bytes(), lambda path: list(read_record(path).images), (OSError, ValueError)))
    cases += [(file, content, evaluated, (EvaluationError,)) for file, content in results(folder / "eval").items()]
    return cases


@pytest.fixture
def limited_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:  # noqa: PTH123
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("limited_memory")
def test_corrupted_files_are_read_or_refused_in_a_sentence(tmp_path: Path) -> None:
    cases = readers(tmp_path)
    for file, content, read, _ in cases:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        if "masks" not in file.parts:  # most of these pictures are none
            read(file)  # it is whole
    for number in range(CASES):
        rng = random.Random(f"{SEED} {number}")
        file, content, read, refusals = cases[rng.randrange(len(cases))]
        damaged = corrupted(content, rng)
        file.write_bytes(damaged)
        said = "a word"
        try:
            read(file)
        except refusals as error:
            said = str(error)
        except BaseException as error:
            (tmp_path / "failed").write_bytes(damaged)
            raise AssertionError(f"case {number}: {file.name}: {error!r}; kept as {tmp_path / 'failed'}") from error
        assert said, f"case {number}: {file.name} is refused without a word"
        file.write_bytes(content)
