"""Fuzzes the readers of checkpoints with atheris: `python fuzz_checkpoints.py NEW_FOLDER corpus/checkpoints`."""

import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:  # `read` goes without it
    atheris = None

if atheris is not None and __name__ == "__main__":
    with atheris.instrument_imports(include=["zsad.export", "pickletools", "zipfile", "onnx.helper"]):
        from zsad.export.adopt import read_ready_graph
        from zsad.export.options import IsnetOptions
        from zsad.export.state_dict import CheckpointError, read_state_dict
else:
    from zsad.export.adopt import read_ready_graph
    from zsad.export.options import IsnetOptions
    from zsad.export.state_dict import CheckpointError, read_state_dict

SUFFIXES = (".safetensors", ".pth", ".onnx")
FOLDER = tempfile.TemporaryDirectory(prefix="zsad-fuzz-")


def read(content: bytes) -> None:
    """Read a checkpoint; its first byte chooses the kind. Whatever is refused is so in a sentence."""
    kind = content[0] % (len(SUFFIXES) + 1) if content else 0
    path = Path(FOLDER.name, "a").with_suffix((*SUFFIXES, ".onnx")[kind])
    path.write_bytes(content[1:])
    try:
        if kind < len(SUFFIXES):
            read_state_dict(path)
        else:
            read_ready_graph(path, IsnetOptions(64)).check()
    except CheckpointError as error:
        if not str(error):
            raise AssertionError("refused without a word") from error


if __name__ == "__main__":
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()
