"""Known-good images: found in folders, lists and training splits, drawn by seed, never among what is scored."""

from pathlib import Path

import pytest
from pictures import touch_images

from zsad.engine.images.folders import scan
from zsad.engine.images.references import NoReferencesError, References, count_references, find_references


def find(data: Path, reference: Path | None = None, shots: int | None = None, seed: int = 0) -> References:
    categories = scan(data).categories
    products = {category.product for category in categories} | {"nut"}
    return find_references(categories[0], products, None if reference is None else str(reference), shots, seed)


def names(references: References, root: Path) -> list[str]:
    return [str(image.path.relative_to(root)) for image in references.images]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A category `bolt` with five images in its training split; every picture is another one."""
    touch_images(
        tmp_path,
        "data/bolt/test/good/0.png",
        "data/bolt/test/bent/0.png",
        *(f"data/bolt/train/good/{index}.png" for index in range(5)),
        *(f"good/{index}.png" for index in range(3)),
        "good/masks/0.png",
        "several/nut/0.png",
        "several/bolt/1.png",
        "whole/train/good/2.png",
        "whole/test/bad/0.png",
    )
    return tmp_path / "data"


def test_a_folder(data: Path) -> None:
    assert names(find(data, data.parent / "good"), data.parent) == ["good/0.png", "good/1.png", "good/2.png"]
    assert names(find(data, data.parent / "several"), data.parent) == ["several/bolt/1.png"]
    assert names(find(data, data.parent / "whole"), data.parent) == ["whole/train/good/2.png"]


def test_a_category_without_references_gets_nobody_elses(data: Path) -> None:
    (data.parent / "several" / "bolt").rename(data.parent / "several" / "rod")
    with pytest.raises(NoReferencesError, match="has folders of other categories, but none called bolt"):
        find(data, data.parent / "several")
    listed = data.parent / "shots.txt"
    listed.write_text("several/nut/0.png\n")
    with pytest.raises(NoReferencesError, match="no reference images for bolt"):
        find(data, listed)


def test_shots_are_drawn_by_seed(data: Path) -> None:
    first, again, other = (names(find(data, shots=2, seed=seed), data) for seed in (0, 0, 3))
    assert first == again != other
    assert len(set(first)) == 2
    assert all(name.startswith("bolt/train/good/") for name in first)
    everything = find(data, shots=9)
    assert len(everything.images) == 5
    assert everything.notes == ("only 5 references for 9 shots: all are taken",)


def test_a_list(data: Path) -> None:
    listed = data.parent / "shots.txt"
    listed.write_text("# drawn\ngood/0.png\n\ngood/1.png\nabsent.png\n")
    found = find(data, listed)
    assert names(found, data.parent) == ["good/0.png", "good/1.png"]
    assert "absent.png is left out: there is no such file" in found.notes[0]
    listed.write_text("data/bolt/train/good/0.png\ndata/nut/train/good/1.png\n")
    assert names(find(data, listed), data) == ["bolt/train/good/0.png"]  # of its own category


def test_images_to_be_scored_are_no_references(data: Path) -> None:
    (data.parent / "good" / "twin.png").write_bytes((data / "bolt/test/bent/0.png").read_bytes())
    found = find(data, data.parent / "good")
    assert "twin.png" not in {image.path.name for image in found.images}
    assert "twin.png is left out: it is one of the images to score, test/bent/0.png" in found.notes[0]


def test_of_copies_one_is_a_reference(data: Path) -> None:
    good = data.parent / "good"
    (good / "9.png").write_bytes((good / "1.png").read_bytes())
    found = find(data, good)
    assert names(found, good) == ["0.png", "1.png", "2.png"]
    assert found.notes == (f"the reference {good / '9.png'} is left out: it is a copy of {good / '1.png'}",)
    assert len(set(found.digests)) == 3


def test_an_image_alone_will_do(data: Path) -> None:
    good = data.parent / "good"
    assert names(find(data, good / "1.png"), good) == ["1.png"]
    with pytest.raises(NoReferencesError, match=r"cannot be read .No such file"):
        find(data, good / "absent.png")


def test_none_to_be_had(data: Path) -> None:
    empty = data.parent / "empty"
    empty.mkdir()
    with pytest.raises(NoReferencesError, match=r"no reference images for bolt: looked for .*empty"):
        find(data, empty)
    with pytest.raises(NoReferencesError, match=r"cannot be read .No such file"):
        find(data, data.parent / "nowhere")
    binary = data.parent / "list.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(NoReferencesError, match="must be a folder, an image, or a UTF-8 text"):
        find(data, binary)
    with pytest.raises(NoReferencesError, match="give --reference FOLDER"):
        find(data.parent / "several" / "bolt", shots=1)


def test_they_are_counted_without_being_read(data: Path) -> None:
    (category,) = scan(data).categories
    assert count_references(category, {"bolt"}, None, None) == 5
    assert count_references(category, {"bolt"}, None, 2) == 2
    assert count_references(category, {"bolt"}, str(data.parent / "good"), 9) == 3
    assert count_references(category, {"bolt"}, str(data.parent / "nowhere.txt"), 9) == 0
