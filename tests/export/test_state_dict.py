"""Reading PyTorch files without PyTorch, and without running anything that is in them."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from zsad.export.state_dict import CheckpointError, read_state_dict


class FakePickler(pickle.Pickler):
    """Writes arrays as torch.save does, without PyTorch."""

    def __init__(self, file: io.BytesIO, archive: zipfile.ZipFile) -> None:
        super().__init__(file, protocol=2)
        self.archive, self.count = archive, 0

    def reducer_override(self, item: object) -> object:
        if not isinstance(item, np.ndarray):
            return NotImplemented
        key, self.count = str(self.count), self.count + 1
        self.archive.writestr(f"archive/data/{key}", item.tobytes())
        strides = tuple(step // item.itemsize for step in item.strides)
        return _rebuild_tensor_v2, (Reference(key), 0, item.shape, strides, False, OrderedDict())

    def persistent_id(self, item: object) -> object:
        return ("storage", FloatStorage, item.key, "cpu", 0) if isinstance(item, Reference) else None


class Reference:
    def __init__(self, key: str) -> None:
        self.key = key


class FloatStorage:
    pass


def _rebuild_tensor_v2(*_: object) -> None:
    raise AssertionError("only its name is written")


FloatStorage.__module__, FloatStorage.__qualname__ = "torch", "FloatStorage"
_rebuild_tensor_v2.__module__ = "torch._utils"


def write_archive(path: Path, item: object, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write what torch.save would have written of a state."""
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(FloatStorage=FloatStorage))
    monkeypatch.setitem(sys.modules, "torch._utils", types.SimpleNamespace(_rebuild_tensor_v2=_rebuild_tensor_v2))
    with zipfile.ZipFile(path, "w") as archive:
        file = io.BytesIO()
        FakePickler(file, archive).dump(item)
        archive.writestr("archive/data.pkl", file.getvalue())
    return path


def test_pytorch_archives_equal_safetensors(golden: Path) -> None:
    read = read_state_dict(golden / "dinov2_vit_tiny.pth")
    expected = load_file(golden / "dinov2_vit_tiny.safetensors")
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(read[name], tensor)


def test_nested_dictionaries_are_flattened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    state = {"epoch": 3, "state_dict": OrderedDict({"module.visual.proj": weight, "module.scale": weight[0]})}
    read = read_state_dict(write_archive(tmp_path / "training.pt", state, monkeypatch))
    assert set(read) == {"state_dict.module.visual.proj", "state_dict.module.scale"}
    np.testing.assert_array_equal(read["state_dict.module.visual.proj"], weight)


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


@pytest.mark.parametrize(("offset", "size", "stride"), [(0, 9, 1), (2, 3, 1), (0, 2, 100), (0, 3, -1), (-1, 2, 1)])
def test_a_tensor_beyond_its_storage_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, size: int, stride: int
) -> None:
    class Far:
        def __reduce__(self) -> object:
            return _rebuild_tensor_v2, (Reference("0"), offset, (size,), (stride,), False, None)

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
        with pytest.raises(CheckpointError, match=rf"{name}.*fetch the file again"):
            read_state_dict(tmp_path / name)


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


def test_old_pytorch_files_need_pytorch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="writing the old format needs PyTorch")
    torch.save({"weight": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(read_state_dict(tmp_path / "old.pth")["weight"], np.ones(3))
