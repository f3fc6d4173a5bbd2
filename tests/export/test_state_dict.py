"""Reading PyTorch files without PyTorch, and without running anything that is in them."""

import io
import json
import pickle
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from zsad.export import state_dict
from zsad.export.adopt import read_ready_graph
from zsad.export.options import IsnetOptions
from zsad.export.state_dict import CheckpointError, read_state_dict
from zsad.kernels.machine import peak_memory


class FakePickler(pickle.Pickler):
    """Writes arrays as torch.save does, without PyTorch; two bytes unsigned stand for bfloat16."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[np.ndarray] = []

    def reducer_override(self, item: object) -> object:
        if not isinstance(item, np.ndarray):
            return NotImplemented
        self.storages.append(item)
        strides = tuple(step // item.itemsize for step in item.strides)
        kind = BFloat16Storage if item.dtype == np.uint16 else FloatStorage
        reference = Reference(kind, len(self.storages) - 1, item.size)
        return _rebuild_tensor_v2, (reference, 0, item.shape, strides, False, OrderedDict())

    def persistent_id(self, item: object) -> object:
        return ("storage", item.kind, str(item.key), "cpu", item.count) if isinstance(item, Reference) else None


class Reference:
    def __init__(self, kind: object, key: int = 0, count: int = 4) -> None:
        self.kind, self.key, self.count = kind, key, count


class FloatStorage:
    pass


class BFloat16Storage:
    pass


def _rebuild_tensor_v2(*_: object) -> None:
    raise AssertionError("only its name is written")


for kind in (FloatStorage, BFloat16Storage):
    kind.__module__, kind.__qualname__ = "torch", kind.__name__
_rebuild_tensor_v2.__module__ = "torch._utils"


def pickled(item: object, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, list[np.ndarray]]:
    """Return the pickle of a state as torch.save makes it, and the storages it refers to."""
    names = {"FloatStorage": FloatStorage, "BFloat16Storage": BFloat16Storage}
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(**names))
    monkeypatch.setitem(sys.modules, "torch._utils", types.SimpleNamespace(_rebuild_tensor_v2=_rebuild_tensor_v2))
    file = io.BytesIO()
    pickler = FakePickler(file)
    pickler.dump(item)
    return file.getvalue(), pickler.storages


def zipped(path: Path, objects: bytes, storages: list[np.ndarray], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", objects)
        for key, storage in enumerate(storages):
            archive.writestr(f"archive/data/{key}", storage.tobytes("A"))
    return path


def write_archive(path: Path, item: object, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write what torch.save would have written of a state."""
    return zipped(path, *pickled(item, monkeypatch))


def write_old(path: Path, item: object, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write what torch.save would have written before PyTorch 1.6."""
    objects, storages = pickled(item, monkeypatch)
    parts = [pickle.dumps(head, protocol=2) for head in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    parts += [objects, pickle.dumps([str(key) for key in range(len(storages))], protocol=2)]
    parts += [storage.size.to_bytes(8, "little") + storage.tobytes("A") for storage in storages]
    path.write_bytes(b"".join(parts))
    return path


def test_pytorch_archives_equal_safetensors(golden: Path) -> None:
    read = read_state_dict(golden / "dinov2_vit_tiny.pth")
    expected = load_file(golden / "dinov2_vit_tiny.safetensors")
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(read[name], tensor)


@pytest.mark.parametrize("write", [write_archive, write_old])
def test_nested_dictionaries_are_flattened(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    others = defaultdict(list, exp_avg=weight[1], betas=[0.9], seen={1, 2})
    state = {
        "epoch": 3,
        "state_dict": OrderedDict({"module.visual.proj": weight, "module.scale": weight[0].copy()}),
        "optimizer": {"state": {0: others}, "arguments": types.SimpleNamespace(lr=0.1)},
    }
    read = read_state_dict(write(tmp_path / "training.pt", state, monkeypatch))
    names = {"state_dict.module.visual.proj", "state_dict.module.scale", "optimizer.state.0.exp_avg"}
    assert set(read) == names
    np.testing.assert_array_equal(read["state_dict.module.visual.proj"], weight)
    np.testing.assert_array_equal(read["optimizer.state.0.exp_avg"], weight[1])


@pytest.mark.parametrize("write", [write_archive, write_old])
def test_bfloat16_is_read_as_float32(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upper = np.array([[0x3F80, 0xC020], [0x0000, 0x4049]], np.uint16).T  # 1, −2.5, 0, 3.140625; not contiguous
    read = read_state_dict(write(tmp_path / "half.pth", {"weight": upper}, monkeypatch))
    np.testing.assert_array_equal(read["weight"], np.array([[1, 0], [-2.5, 3.140625]], np.float32))


def test_safetensors_of_bfloat16_need_no_other_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = json.dumps(
        {
            "a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        }
    ).encode()
    data = np.array([0x3F80, 0xC020], np.uint16).tobytes() + np.float32(7).tobytes()
    (tmp_path / "half.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)

    def without_bfloat16(path: Path) -> None:
        raise TypeError("data type 'bfloat16' not understood")

    for loader in (state_dict.load_file, without_bfloat16):
        monkeypatch.setattr(state_dict, "load_file", loader)
        read = read_state_dict(tmp_path / "half.safetensors")
        np.testing.assert_array_equal(np.asarray(read["a"], np.float32), [1, -2.5])
        np.testing.assert_array_equal(read["b"], [7])


def test_dictionaries_in_each_other_are_entered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state: dict[str, object] = {"weight": np.ones(3, np.float32)}
    state["itself"] = state
    shared: dict[str, object] = state
    for _ in range(41):
        shared = {"a": shared, "b": shared}
    assert set(read_state_dict(write_archive(tmp_path / "self.pth", state, monkeypatch))) == {"weight"}
    assert len(read_state_dict(write_archive(tmp_path / "shared.pth", shared, monkeypatch))) == 1
    levels = 5000
    deep = b"\x80\x02}" + b"X\x01\x00\x00\x00a}" * levels + b"s" * levels + b"."
    with pytest.raises(CheckpointError, match=r"deep\.pth: damaged"):
        read_state_dict(zipped(tmp_path / "deep.pth", deep, []))


def test_parts_that_grow_when_they_are_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects, storages = pickled({"weight": np.zeros(1 << 20, np.float32)}, monkeypatch)
    packed = zipped(tmp_path / "packed.pth", objects, storages, zipfile.ZIP_DEFLATED)
    assert packed.stat().st_size < storages[0].nbytes / 100
    with pytest.raises(CheckpointError, match="compressed or larger than the file"):
        read_state_dict(packed)


def test_numpy_gets_no_type_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of type `O` the bytes of a storage would be taken for pointers."""

    class Pointers:
        def __reduce__(self) -> object:
            return _rebuild_tensor_v2, (Reference("O"), 0, (1,), (1,), False, None)

    objects, _ = pickled(Pointers(), monkeypatch)
    with pytest.raises(CheckpointError, match="not supported"):
        read_state_dict(zipped(tmp_path / "pointers.pth", objects, [np.full(8, 65, np.uint8)]))


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return (open, (self.path, "w"))


def test_code_in_an_archive_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "ran"
    state = {"weight": np.ones(3, np.float32), "bomb": Bomb(str(target))}
    assert set(read_state_dict(write_archive(tmp_path / "evil.pth", state, monkeypatch))) == {"weight"}
    assert not target.exists()


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, 9, 1), (2, 3, 1), (0, 2, 100), (0, 3, -1), (-1, 2, 1), (0, 10**12, 0), (10**30, 1, 1)],
)
def test_a_tensor_beyond_its_storage_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, size: int, stride: int
) -> None:
    class Far:
        def __reduce__(self) -> object:
            return _rebuild_tensor_v2, (Reference(FloatStorage), offset, (size,), (stride,), False, None)

    path = write_archive(tmp_path / "far.pth", {"a": np.zeros(4, np.float32), "far": Far()}, monkeypatch)
    with pytest.raises(CheckpointError, match=r"far\.pth: damaged"):
        read_state_dict(path)


def test_truncated_and_foreign_archives_are_named(golden: Path, tmp_path: Path) -> None:
    whole = (golden / "dinov2_vit_tiny.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[whole.index(load_file(golden / "dinov2_vit_tiny.safetensors")["norm.weight"].tobytes())] ^= 1
    (tmp_path / "flipped.pth").write_bytes(flipped)
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    for name in ("cut.pth", "flipped.pth", "other.pth"):
        with pytest.raises(CheckpointError, match=rf"{name}.*put a whole copy in its place"):
            read_state_dict(tmp_path / name)


@pytest.mark.torch
def test_torchscript_archives_are_read_without_running_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="writing TorchScript needs PyTorch")
    model = torch.nn.Module()
    model.visual = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)).half()
    model.register_buffer("resolution", torch.tensor(336))
    model.shared = torch.nn.Parameter(torch.randn(3, 2).T)  # not contiguous
    torch.jit.script(model).save(str(tmp_path / "clip.pt"))
    read = read_state_dict(tmp_path / "clip.pt")
    assert set(read) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(read[name], tensor.numpy())


@pytest.mark.torch
def test_files_of_old_pytorch_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="writing the old format with PyTorch's own code")
    halves = torch.randn(3, 2).bfloat16()
    state = {"model": {"weight": halves.T, "bias": torch.nn.Parameter(torch.ones(3)), "tied": halves}}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    read = read_state_dict(tmp_path / "old.pth")
    assert set(read) == {"model.weight", "model.bias", "model.tied"}
    for name, tensor in state["model"].items():
        np.testing.assert_array_equal(read[f"model.{name}"], tensor.detach().float().numpy())


def test_damaged_old_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_old(tmp_path / "old.pth", {"weight": np.ones(3, np.float32)}, monkeypatch)
    whole = path.read_bytes()
    keys = pickle.dumps(["0"], protocol=2)
    assert whole.count(keys) == 1
    foreign = whole.replace(keys, pickle.dumps([], protocol=2))
    for damaged in (whole[:-1], whole[:40], foreign, pickle.dumps({"weight": 1}), b"<html>Not found</html>"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"old\.pth: damaged or not what its name says") as caught:
            read_state_dict(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("archived", [True, False])
@pytest.mark.parametrize("number", [b"r\xff\xff\xff\x0f", b"p268435455\n"])
def test_pickles_that_number_their_objects_as_no_real_one_does_take_no_memory(
    tmp_path: Path, archived: bool, number: bytes
) -> None:
    """The number is a place in an array that the unpickler would make as large as it is: 4 GB."""
    path = tmp_path / "model.pth"
    objects = b"\x80\x02}" + number + b"."
    if archived:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/data.pkl", objects)
    else:
        path.write_bytes(objects)
    before = peak_memory()
    with pytest.raises(CheckpointError, match="numbers its objects as no real one does"):
        read_state_dict(path)
    assert peak_memory() - before < 2**28


@pytest.mark.parametrize("read", [read_state_dict, lambda path: read_ready_graph(path, IsnetOptions())])
def test_names_in_graphs_must_be_text(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "model.onnx"
    tensor = helper.make_tensor("name", TensorProto.FLOAT, [1], [0.0])
    content = helper.make_model(helper.make_graph([], "graph", [], [], [tensor])).SerializeToString()
    path.write_bytes(content.replace(b"name", b"na\xffe"))
    with pytest.raises(CheckpointError, match=r"damaged or .*a name in it is no UTF-8"):
        read(path)
