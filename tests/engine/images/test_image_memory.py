"""Memory: reading an image and writing its results hold no more than the header said, and not far less."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

SIZE = (4000, 3000)

# Runs on its own, so that the highest use of memory is that of one image.
WRITE = """
import sys
from pathlib import Path
import numpy as np
import cv2, tifffile
from zsad.engine.images.decode import decode, network_input, recipe
from zsad.engine.images.duplicates import Duplicates
from zsad.engine.images.stored import decoded_bytes
from zsad.engine.results.drawing import draw_small, jpeg
from zsad.engine.scores.maps import object_mask, pixel_map
from PIL import Image

def highest():
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

path = Path(sys.argv[1])
estimate = decoded_bytes(path)
Path("/proc/self/clear_refs").write_text("5")  # the highest use starts again from the present one
before = highest()
image = decode(path)
network_input(image, recipe("clip", 518))
Duplicates().add(0, path, image)
read = highest() - before
picture = np.asarray(image)
bgr = np.ascontiguousarray(picture[:, :, ::-1])
mask = object_mask(bgr) if sys.argv[2] == "masked" else None
scores = pixel_map(np.eye(37), picture.shape[:2], (0.0, 1.0), mask)
Image.fromarray(scores).save(path.with_name("map.tiff"), format="TIFF")
jpeg(draw_small(bgr, scores)[1], 90)
print(estimate, read, highest() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    "kind",
    [
        *("jpeg", "grey png", "16 bit tiff"),
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("masked jpeg", "alpha png", "16 bit colour tiff", "16 bit planes")
        ),
    ],
)
def test_estimate(tmp_path: Path, kind: str) -> None:
    grey = np.zeros(SIZE[::-1], np.uint8)
    grey[::7] = np.arange(SIZE[0]) % 251
    levels, path = grey.astype(np.uint16) * 257, tmp_path / "image"
    rgb = Image.merge("RGB", [Image.fromarray(grey)] * 3)
    if "jpeg" in kind:
        rgb.save(path, "JPEG")
    elif kind == "grey png":
        Image.fromarray(grey).save(path, "PNG", compress_level=1)
    elif kind == "alpha png":
        rgb.putalpha(Image.fromarray(grey))
        rgb.save(path, "PNG", compress_level=1)
    elif kind == "16 bit tiff":
        Image.fromarray(levels).save(path, "TIFF")
    elif kind == "16 bit colour tiff":
        tifffile.imwrite(path, np.stack([levels] * 3, axis=2), photometric="rgb")
    else:
        tifffile.imwrite(
            path, np.stack([levels] * 4), photometric="rgb", planarconfig="separate", extrasamples=["unassalpha"]
        )
    command = [sys.executable, "-c", WRITE, str(path), kind.split()[0]]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    estimate, read, written = (int(number) / SIZE[0] / SIZE[1] for number in found.stdout.split())
    print(f"{kind}: {estimate:.0f} bytes per pixel estimated, reading took {read:.1f}, with writing {written:.1f}")
    assert written < 1.1 * estimate
    assert written > 0.75 * estimate
