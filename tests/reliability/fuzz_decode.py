"""Fuzzes `decode` with atheris: `python fuzz_decode.py NEW_FOLDER corpus/decode`."""

import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:  # `read` goes without it
    atheris = None

if atheris is not None and __name__ == "__main__":
    with atheris.instrument_imports(include=["zsad.engine.images", "PIL", "tifffile"]):
        from zsad.engine.images.decode import decode
        from zsad.engine.images.limits import Limits, limited
        from zsad.engine.images.stored import ImageError
else:
    from zsad.engine.images.decode import decode
    from zsad.engine.images.limits import Limits, limited
    from zsad.engine.images.stored import ImageError

SUFFIXES = (".png", ".tga")  # anything may look like the latter
FOLDER = tempfile.TemporaryDirectory(prefix="zsad-fuzz-")


def read(content: bytes) -> None:
    """Decode an image; its first byte chooses the suffix. Whatever is refused is so in a sentence."""
    path = Path(FOLDER.name, "a").with_suffix(SUFFIXES[content[0] % 2 if content else 0])
    path.write_bytes(content[1:])
    with limited(Limits(megapixels=1)):
        try:
            image = decode(path)
            assert image.mode == "RGB"
            assert min(image.size) > 0
        except ImageError as error:
            if not str(error):
                raise AssertionError("refused without a word") from error


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")  # of Pillow, which the commands do not show either
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()
