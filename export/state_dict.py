"""Reads the tensors of a checkpoint file, whatever wrote it, and runs nothing that is in it."""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors import SafetensorError
from safetensors.numpy import load_file

StateDict = Mapping[str, NDArray[Any]]

# PyTorch's storage classes by the type of their elements.
STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class CheckpointError(Exception):
    """A checkpoint that cannot be had or cannot be used; the message says how to mend it."""


def read_state_dict(path: Path) -> StateDict:
    """Read the tensors of a .safetensors, .onnx, .pth, .pt or .bin file by name, as they are stored.

    Dictionaries and TorchScript modules inside PyTorch files are flattened: `visual.conv1.weight`. Raises
    CheckpointError when the file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint file")
    suffix = path.suffix.lower()
    try:
        if suffix == ".safetensors":
            tensors: StateDict = load_file(path)
            return tensors
        if suffix == ".onnx":
            return _read_onnx_initializers(path)
        if suffix in (".pth", ".pt", ".bin"):
            return _read_torch(path)
    except (SafetensorError, zipfile.BadZipFile, pickle.UnpicklingError, ValueError, EOFError, LookupError) as error:
        raise CheckpointError(f"{path}: damaged or not what its name says ({error}); fetch the file again") from error
    raise CheckpointError(f"{path}: a checkpoint must be .safetensors, .pth, .pt, .bin or .onnx, not {suffix!r}")


class _Inert:
    """Stands for every object of a PyTorch file that is no tensor; keeps its state, does nothing."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _TensorUnpickler(pickle.Unpickler):
    """Rebuilds the tensors of a PyTorch archive as arrays.

    A name in the pickle leads to one of the few things here or to `_Inert`, so that nothing else can be called.
    """

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(archive.open(f"{folder}data.pkl"))
        self.archive, self.folder = archive, folder
        self.buffers: dict[str, bytes] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name.endswith("Storage"):
            if name not in STORAGES:
                raise ValueError(f"tensors of type torch.{name} are not supported")
            return STORAGES[name]
        return _Inert

    def persistent_load(self, identifier: Any) -> Any:
        _, dtype, key, *_ = identifier
        if key not in self.buffers:
            self.buffers[key] = self.archive.read(f"{self.folder}data/{key}")
        return self.buffers[key], np.dtype(dtype)


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> NDArray[Any]:
    """Return a view of a storage; NumPy refuses what would reach beyond it."""
    buffer, dtype = storage
    strides = [step * dtype.itemsize for step in stride]
    tensor: NDArray[Any] = np.ndarray(tuple(size), dtype, buffer, offset * dtype.itemsize, strides)
    return tensor


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _read_torch(path: Path) -> StateDict:
    """Read what torch.save or torch.jit.save wrote, both zip archives; older files go to PyTorch itself."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return dict(_named_tensors(_read_old_torch(path), ""))
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError("an archive, but not PyTorch's")
        try:
            loaded = _TensorUnpickler(archive, pickles[0].removesuffix("data.pkl")).load()
        except (TypeError, AttributeError) as error:  # what a pickle does to objects that it expected to be others
            raise ValueError(f"not a plain file of weights: {error}") from error
    return dict(_named_tensors(loaded, ""))


def _named_tensors(item: Any, name: str) -> Iterator[tuple[str, NDArray[Any]]]:
    if isinstance(item, _Inert):
        item = item.state
    if isinstance(item, np.ndarray):
        yield name, item
    elif isinstance(item, Mapping):
        for key, value in item.items():
            yield from _named_tensors(value, f"{name}.{key}" if name else str(key))


def _read_old_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path}: not an archive as PyTorch has written since 1.6; fetch the file again, or, if it really is that "
            "old, install PyTorch to read it: pip install 'zsad[export]'"
        ) from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and torch each raise their own kind
        raise CheckpointError(f"{path}: damaged, or not a plain file of weights ({error})") from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a dictionary of tensors")
    return {name: tensor.numpy() for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}


def _read_onnx_initializers(path: Path) -> StateDict:
    """Recover parameter names from a PyTorch export, where constant folding has made some anonymous.

    Linear weights appear transposed as the right operand of a MatMul whose node is named after its module; the position
    embedding was cut into the class token's row and the patches' rows.
    """
    try:
        graph = onnx.load(path).graph
    except Exception as error:  # protobuf raises its own DecodeError
        raise ValueError(str(error)) from error
    raw = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name: array for name, array in raw.items() if "::" not in name}
    positions = {}
    for node in graph.node:
        module = node.name.strip("/").replace("/", ".")
        for index, name in enumerate(node.input):
            if "::" not in name or name not in raw:
                continue
            if node.op_type == "MatMul" and index == 1:
                named[module.removesuffix(".MatMul") + ".weight"] = raw[name].T
            elif ".embeddings." in f".{module}." and raw[name].ndim == 3:
                prefix = module[: module.index("embeddings")]
                positions["class" if raw[name].shape[1] == 1 else "patches"] = (prefix, raw[name])
    if len(positions) == 2:
        prefix = positions["patches"][0]
        named[prefix + "embeddings.position_embeddings"] = np.concatenate(
            [positions["class"][1], positions["patches"][1]], axis=1
        )
    return named
