"""Duplicates: copies are found in whichever way they were made, photographs of the same product never are."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zsad.engine.images.decode import decode
from zsad.engine.images.duplicates import NEAR_LARGEST, NEAR_RMS, Copies, Duplicates, _thumbnail


@functools.cache
def part(seed: int, moved: bool = True, noise: float = 4.0) -> Image.Image:
    """A photograph of a plate with a ring; `moved`: it lies a little elsewhere each time, and the light changes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:240, 0:360] + 3 * moved * rng.standard_normal(2)[:, None, None]
    values = 120 + 25 * np.sin(x / 9) + noise * rng.standard_normal(x.shape)
    values += 3 * moved * rng.standard_normal()
    values += 60 * (np.abs(np.hypot(x - 180, y - 120) - 80) < 12)
    values = np.clip(values, 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([values, values, values // 2 + 60], axis=2))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    content = BytesIO()
    image.save(content, "JPEG", quality=quality)
    return Image.open(content).convert("RGB")


def resized(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "quality 90": lambda image: jpeg(image, 90),
    "quality 75": lambda image: jpeg(image, 75),
    "2 % larger": lambda image: resized(image, 1.02),
    "2 % smaller": lambda image: resized(image, 0.98),
    "2 % smaller, quality 75": lambda image: jpeg(resized(image, 0.98), 75),
    "half": lambda image: resized(image, 0.5),
}


def found(folder: Path, images: list[Image.Image], suffixes: dict[int, str] | None = None) -> list[Copies]:
    duplicates = Duplicates()

    def add(index: int) -> None:
        path = folder / f"{index}{(suffixes or {}).get(index, '.png')}"
        images[index].copy().save(path)  # Pillow keeps the settings of a format in the picture
        duplicates.add(index, path, decode(path))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(len(images))))
    return duplicates.groups()


@pytest.mark.slow
@pytest.mark.parametrize(
    "moved", [pytest.param(False, marks=pytest.mark.slow), True]
)  # a still camera with noise, and a part that moves
def test_photographs_of_one_product_are_no_copies(tmp_path: Path, moved: bool) -> None:
    assert found(tmp_path, [part(seed, moved) for seed in range(20)]) == []


@pytest.mark.parametrize("moved", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "quality 75" else pytest.mark.slow) for kind in COPIES]
)
def test_near_copies_are_found(tmp_path: Path, kind: str, moved: bool) -> None:
    images = [part(seed, moved) for seed in range(18)]
    images += [COPIES[kind](images[3]), COPIES[kind](images[11])]
    assert found(tmp_path, images) == [Copies((3, 18), False), Copies((11, 19), False)]


@pytest.mark.slow
def test_exact_copies_are_found_by_file_and_by_pixels(tmp_path: Path) -> None:
    images = [part(seed) for seed in range(8)]
    images += [images[2], images[2], images[5], images[2]]
    groups = found(tmp_path, images, {9: ".bmp", 10: ".tif"})
    assert groups == [Copies((2, 8, 9, 11), True), Copies((5, 10), True)]
    mixed = found(tmp_path, [*images, jpeg(images[5], 80)], {9: ".bmp", 10: ".tif"})
    assert mixed == [Copies((2, 8, 9, 11), True), Copies((5, 10, 12), False)]


@pytest.mark.slow
def test_many_copies_of_one_image(tmp_path: Path) -> None:
    images = [part(seed) for seed in range(6)] + [part(0)] * 14
    assert found(tmp_path, images) == [Copies((0, *range(6, 20)), True)]
    every_image_twice = [part(seed) for seed in range(8)] + [jpeg(part(seed), 85) for seed in range(8)]
    assert found(tmp_path, every_image_twice) == [Copies((seed, seed + 8), False) for seed in range(8)]


def test_a_defect_tells_two_images_of_one_scene_apart(tmp_path: Path) -> None:
    clean = part(0)
    scratched = np.array(clean)
    scratched[100:112, 200:230] = 20
    images = [part(seed) for seed in range(1, 12)]
    assert found(tmp_path, [*images, clean, Image.fromarray(scratched)]) == []


def test_without_pixels_the_file_counts(tmp_path: Path) -> None:
    duplicates = Duplicates()
    for index, content in enumerate((b"a", b"b", b"a", b"c")):
        path = tmp_path / f"{index}.jpg"
        path.write_bytes(content)
        duplicates.add(index, path, None)
    assert duplicates.groups() == [Copies((0, 2), True)]
    assert Duplicates().groups() == []


@pytest.mark.long
@pytest.mark.parametrize("category", ["ball_screw", "magnetic_tile", "solar_cell_mono"])
def test_on_photographs(tmp_path: Path, real_data: Path, category: str) -> None:
    paths = sorted(path for path in (real_data / category / "test").rglob("*") if path.is_file())
    duplicates, images = Duplicates(), [decode(path) for path in paths]
    for index, image in enumerate(images):
        duplicates.add(index, paths[index], image)
    assert duplicates.groups() == []
    chosen = range(0, len(paths), 6)
    thumbnails = np.stack([_thumbnail(image) for image in images])  # [N, T]
    apart = np.sqrt(np.mean((thumbnails[:, None] - thumbnails) ** 2, axis=2) + 99 * np.eye(len(images)))
    print(f"{category}: photographs differ by {apart.min():.2f} or more")
    assert apart.min() > 3 * NEAR_RMS
    for kind, copy in COPIES.items():
        copies = Duplicates()
        copies._files, copies._thumbnails = dict(duplicates._files), dict(duplicates._thumbnails)
        changes = []
        for number, index in enumerate(chosen):
            image = copy(images[index])
            path = tmp_path / f"{kind} {number}.bmp"  # nothing is compressed
            image.save(path)
            copies.add(len(paths) + number, path, image)
            changes.append(_thumbnail(image) - thumbnails[index])
        rms = max(float(np.sqrt(np.mean(change**2))) for change in changes)
        largest = max(float(np.abs(change).max()) for change in changes)
        print(f"{category}: {kind} differs by up to {rms:.2f}, {largest:.1f} in one place")
        if kind == "half":  # beyond what is promised
            continue
        assert rms < NEAR_RMS
        assert largest < NEAR_LARGEST
        expected = [Copies((index, len(paths) + number), False) for number, index in enumerate(chosen)]
        assert copies.groups() == expected
