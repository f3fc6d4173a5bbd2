"""Reads the tensors of a checkpoint file, whatever wrote it, and runs nothing that is in it."""

import math
import mmap
import os
import pickle
import pickletools
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from onnx import ModelProto

StateDict = Mapping[str, NDArray[Any]]

BFLOAT16 = np.dtype("V2")  # NumPy has none of its own: two bytes, until `_widened` makes them floats
# Element types by the names of PyTorch's storage classes and of safetensors.
TYPES: dict[tuple[str, str], Any] = {
    ("DoubleStorage", "F64"): np.float64,
    ("FloatStorage", "F32"): np.float32,
    ("HalfStorage", "F16"): np.float16,
    ("BFloat16Storage", "BF16"): BFLOAT16,
    ("LongStorage", "I64"): np.int64,
    ("IntStorage", "I32"): np.int32,
    ("ShortStorage", "I16"): np.int16,
    ("CharStorage", "I8"): np.int8,
    ("ByteStorage", "U8"): np.uint8,
    ("BoolStorage", "BOOL"): np.bool_,
}
Storages = Mapping[str, bytes | bytearray]
DTYPES = {name: np.dtype(dtype) for names, dtype in TYPES.items() for name in names}
# What reading a damaged, foreign or malicious file ends in; RuntimeErrors are recursions and encrypted archives.
DAMAGE = (
    SafetensorError,
    zipfile.BadZipFile,
    zlib.error,
    pickle.UnpicklingError,
    ValueError,
    EOFError,
    LookupError,
    ArithmeticError,
    RuntimeError,
)
OLD_MAGIC = 0x1950A86A20F9469CFC6C  # PyTorch's, before 1.6


class CheckpointError(Exception):
    """A checkpoint that cannot be had or cannot be used; the message says how to mend it."""


def read_state_dict(path: Path) -> StateDict:
    """Read the tensors of a .safetensors, .onnx, .pth, .pt or .bin file by name, as they are stored.

    For bfloat16 may stand float32. Dictionaries and TorchScript modules inside PyTorch files are flattened:
    `visual.conv1.weight`. Raises CheckpointError when the file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint file")
    if re.search(r"-\d+-of-\d+$", path.stem):
        raise CheckpointError(f"{path}: one of several shards; join them in one file")
    suffix = path.suffix.lower()
    try:
        if suffix == ".safetensors":
            return _read_safetensors(path)
        if suffix == ".onnx":
            return _read_onnx_initializers(path)
        if suffix in (".pth", ".pt", ".bin"):
            return _read_torch(path)
    except DAMAGE as error:
        raise CheckpointError(
            f"{path}: damaged or not what its name says ({error}); put a whole copy in its place"
        ) from error
    raise CheckpointError(f"{path}: a checkpoint must be .safetensors, .pth, .pt, .bin or .onnx, not {suffix!r}")


def _widened(tensor: NDArray[Any]) -> NDArray[Any]:
    """Return bfloat16, the upper half of a float32, as float32, and everything else as it is."""
    if tensor.dtype != BFLOAT16:
        return tensor
    return (tensor.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _read_safetensors(path: Path) -> StateDict:
    try:
        tensors: StateDict = load_file(path)
        return tensors
    except (TypeError, AttributeError):  # bfloat16, where nothing has taught NumPy what it is
        return {
            name: _widened(np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"]))
            for name, entry in deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
        }


class _Inert:
    """Stands for every object of a PyTorch file that is no tensor; keeps what is put into it, does nothing."""

    content: dict[Any, Any]

    def __new__(cls, *_: Any, **__: Any) -> "_Inert":
        inert = super().__new__(cls)
        inert.content = {}
        return inert

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.content.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.content[key] = value

    def extend(self, items: Any) -> None:
        pass

    append = add = extend


class _TensorUnpickler(pickle.Unpickler):
    """Rebuilds the tensors of a PyTorch file as arrays.

    A name in the pickle leads to one of the few things here or to `_Inert`, so that nothing else can be called.
    read_storage: returns the memory of a storage by its key and its size in bytes.
    """

    def __init__(self, file: Any, read_storage: Callable[[str, int], bytes | bytearray]) -> None:
        super().__init__(file)
        self.read_storage = read_storage
        self.storages: dict[str, bytes | bytearray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name.endswith("Storage"):
            if name not in DTYPES:
                raise ValueError(f"tensors of type torch.{name} are not supported")
            return DTYPES[name]
        return _Inert

    def persistent_load(self, identifier: Any) -> Any:
        _, dtype, key, _, count, *view = identifier
        if not isinstance(dtype, np.dtype) or any(view):  # any other type NumPy might take for one of pointers
            raise ValueError("a storage of a kind that is not supported")
        if key not in self.storages:
            self.storages[key] = self.read_storage(key, count * dtype.itemsize)
        return self.storages[key], dtype


def _unpickled(file: Any, read_storage: Callable[[str, int], bytes | bytearray]) -> tuple[Any, Storages]:
    """Return the objects of the next pickle in a file, and the storages that they lie in.

    Raises ValueError for one that asks for memory which nothing fills: the numbers under which pickles remember objects
    are places in an array, and real ones count from 0.
    """
    start = file.tell()
    for done, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > done:
            raise ValueError("a pickle that numbers its objects as no real one does")
    file.seek(start)
    unpickler = _TensorUnpickler(file, read_storage)
    return unpickler.load(), unpickler.storages


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> NDArray[Any]:
    """Return a view of a storage; NumPy refuses what would reach beyond it."""
    buffer, dtype = storage
    if math.prod(size) * dtype.itemsize > len(buffer):  # strides of 0 would make any size of a few bytes
        raise ValueError("a tensor is larger than its storage")
    strides = [step * dtype.itemsize for step in stride]
    tensor: NDArray[Any] = np.ndarray(tuple(size), dtype, buffer, offset * dtype.itemsize, strides)
    return tensor


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _read_torch(path: Path) -> StateDict:
    """Read what torch.save or torch.jit.save wrote: zip archives, before PyTorch 1.6 a row of pickles."""
    with path.open("rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        try:
            loaded = _load_archive(file, size) if archive else _load_pickles(file, size)
        except (TypeError, AttributeError, OSError) as error:  # senseless operands, offsets and sizes
            raise ValueError(f"not a plain file of weights: {error!r}") from error
    return dict(_named_tensors(loaded, "", set()))


def _load_archive(file: BufferedReader, size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError("an archive, but not PyTorch's")
        folder = pickles[0].removesuffix("data.pkl")
        parts = [info for info in archive.infolist() if info.filename.startswith(folder + "data")]
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > size:
            raise ValueError("its parts are compressed or larger than the file, as PyTorch writes none")
        objects = BytesIO(archive.read(pickles[0]))
        return _unpickled(objects, lambda key, _: archive.read(f"{folder}data/{key}"))[0]


def _load_pickles(file: BufferedReader, size: int) -> Any:
    """Read the older format: magic number, version, platform, the objects, the storages' keys, then their bytes."""

    def reserve(_: str, length: int) -> bytearray:
        if length > size:
            raise ValueError("a storage is larger than the file")
        return bytearray(length)

    with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as content:  # of which no one reads beyond the end
        if _unpickled(content, reserve)[0] != OLD_MAGIC:
            raise ValueError("not a file that PyTorch wrote")
        for _ in ("version", "platform", "objects"):
            loaded, storages = _unpickled(content, reserve)
        keys, _ = _unpickled(content, reserve)
        file.seek(content.tell())
    if set(keys) != set(storages):
        raise ValueError("its storages are not those of its tensors")
    for key in keys:
        storage = storages[key]
        file.seek(8, os.SEEK_CUR)  # the number of elements once more
        if file.readinto(storage) != len(storage):
            raise EOFError("the file ends within a storage")
    return loaded


def _named_tensors(item: Any, name: str, seen: set[int]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield what is in nested dictionaries; seen: the ids of those that need not be entered again."""
    if isinstance(item, _Inert):
        item = item.content
    if isinstance(item, np.ndarray):
        yield name, _widened(item)
    elif isinstance(item, dict) and id(item) not in seen:
        seen.add(id(item))
        for key, value in item.items():
            if isinstance(key, str | int):
                yield from _named_tensors(value, f"{name}.{key}" if name else str(key), seen)


def load_model(path: Path, external_data: bool = True) -> "ModelProto":
    """Return the model of an ONNX file; raises ValueError where it is damaged, also where a name is no text."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=external_data)
    except MemoryError:
        raise
    except Exception as error:  # protobuf raises its own DecodeError
        if "alloc" in str(error):
            raise MemoryError(str(error)) from None
        raise ValueError(str(error)) from error
    if not _is_text(model):
        raise ValueError("a name in it is no UTF-8")
    return model


def _is_text(message: Any) -> bool:
    """Tell whether all names in a message of protobuf are text; what is no UTF-8 it gives as bytes, unasked."""
    for field, value in message.ListFields():
        if field.type in (field.TYPE_STRING, field.TYPE_MESSAGE):
            values = [value] if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value
            if not all(isinstance(each, str) or (not isinstance(each, bytes) and _is_text(each)) for each in values):
                return False
    return True


def _read_onnx_initializers(path: Path) -> StateDict:
    """Recover parameter names from a PyTorch export, where constant folding has made some anonymous.

    Linear weights appear transposed as the right operand of a MatMul whose node is named after its module; the position
    embedding was cut into the class token's row and the patches' rows.
    """
    from onnx import numpy_helper

    graph = load_model(path).graph
    try:
        raw = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    except (TypeError, AttributeError) as error:  # element types that there are not
        raise ValueError(str(error)) from error
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
