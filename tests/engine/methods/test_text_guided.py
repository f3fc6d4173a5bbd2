"""What users of the text-guided presets get wrong: a clear message, and the rest is done."""

import re
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from clip_checkpoints import ARRAYS, write_clip
from pictures import touch_images
from PIL import Image

from zsad.engine.commands.infer import main
from zsad.engine.methods.arrays import HostArrays
from zsad.engine.methods.method import Group
from zsad.engine.methods.text_guided import TextGuided
from zsad.engine.networks.network import TensorSpec
from zsad.engine.results.records import CategoryRecord
from zsad.engine.scores.verdicts import Bounds


@pytest.fixture
def tiny(tokenizer: object, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of a run of tiny networks over a few pictures."""
    monkeypatch.setenv("ZSAD_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    checkpoint = write_clip(tmp_path, "clip_tiny")
    Path("tiny.toml").write_text(f'image_size = 96\n[networks.clip]\ncheckpoint = "{checkpoint}"\n')
    touch_images(tmp_path, "data/bolt/0.png", "data/bolt/1.png", "data/nut/0.png", "data/nut/1.png")
    return ["data", "--preset", "winclip", "--config", "tiny.toml"]


def images_of(name: str) -> int:
    return len(CategoryRecord.from_json(Path(f"out/{name}/category.json").read_text()).images)


@pytest.mark.slow
def test_objects_without_letters(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny, "--object", "?!"]) == 2
    assert "--object must be a name with letters, not '?!'" in capsys.readouterr().err
    Path("data/nut").rename("data/--")
    assert main(tiny) == 1
    assert "'--' is no name of an object" in capsys.readouterr().err
    assert images_of("bolt") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "metal {nut}",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("{}", "x" * 500, "Schräubchen & Mütter 🔩")),
    ],
)
def test_objects_of_any_name(tiny: list[str], name: str) -> None:
    if name == "{}":
        name += " part"
    assert main([*tiny, "--object", name]) == 0


@pytest.mark.slow
def test_names_by_folder(tiny: list[str]) -> None:
    with Path("tiny.toml").open("a") as file:
        file.write('[winclip]\nobject_names = { nut = "bolt" }\n')
    shutil.rmtree("data/nut")
    shutil.copytree("data/bolt", "data/nut")
    assert main(tiny) == 0
    one, two = (CategoryRecord.from_json(Path(f"out/{name}/category.json").read_text()) for name in ("bolt", "nut"))
    assert [image.raw_score for image in one.images] == [image.raw_score for image in two.images]


@pytest.mark.slow
def test_references_of_one_category_that_cannot_be_had(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    touch_images(Path.cwd(), "good/bolt/5.png", "good/nut/broken.png", seed=10)
    Path("good/nut/broken.png").write_bytes(b"no picture")
    assert main([*tiny, "--reference", "good"]) == 1
    said = capsys.readouterr().err
    assert "nut: of 1 reference none can be read: " in said
    assert "; 2 images without a score" in said
    assert "nut/0.png: skipped" not in said
    assert images_of("bolt") == 2
    assert main([*tiny, "--reference", "nowhere"]) == 2
    assert "--reference nowhere: there is no such folder or list" in capsys.readouterr().err
    Path("empty").mkdir()
    assert main([*tiny, "--reference", "empty"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "looked for images in empty/ and below; give --reference a folder that has some" in line


@pytest.mark.slow
def test_an_unreadable_reference_among_others(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    touch_images(Path.cwd(), *(f"good/{index}.png" for index in range(6)), seed=10)
    Path("good/5.png").write_bytes(b"no picture")
    assert main([*tiny, "--reference", "good", "--shots", "9"]) == 1
    error = capsys.readouterr().err
    assert "good/5.png: skipped: not a PNG" in error
    assert images_of("bolt") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe", "cannot be read as TOML"),
        (b'normal = ["{}"]', "abnormal is missing"),
        (b'normal = []\nabnormal = ["broken {}"]', "normal must be a list of one or more texts"),
    ],
)
def test_files_of_prompts(tiny: list[str], capsys: pytest.CaptureFixture[str], content: bytes, reason: str) -> None:
    Path("mine.toml").write_bytes(content)
    assert main([*tiny, "--prompts", "mine.toml"]) == 2
    assert reason in capsys.readouterr().err
    Path("mine.toml").write_text('normal = ["{}"]\nabnormal = ["{} with missing solder", "bent pin"]')
    assert main([*tiny, "--prompts", "mine.toml"]) == 0
    assert main([*tiny, "--prompts", "theirs"]) == 2
    assert "there is no prompt set 'theirs'; choose one of anomalib21" in capsys.readouterr().err


@pytest.mark.long
def test_other_words_are_other_results(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.toml").write_text('normal = ["{}"]\nabnormal = ["broken {}"]')
    assert main([*tiny, "--prompts", "mine.toml"]) == 0
    capsys.readouterr()
    assert main([*tiny, "--prompts", "mine.toml", "--resume"]) == 0
    assert "bolt: already finished" in capsys.readouterr().err
    Path("mine.toml").write_text('normal = ["{}"]\nabnormal = ["bent {}"]')
    assert main([*tiny, "--prompts", "mine.toml", "--resume"]) == 0
    assert "already finished" not in capsys.readouterr().err
    touch_images(Path.cwd(), "good/0.png", "good/1.png", seed=10)
    for seed in ("0", "0", "5"):
        assert main([*tiny, "--reference", "good", "--shots", "1", "--seed", seed, "--resume"]) == 0
    assert capsys.readouterr().err.count("bolt: already finished") == 1


@pytest.mark.slow
def test_a_folder_of_a_split_is_no_name_of_an_object(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    touch_images(Path.cwd(), "sets/bolt/test/0.png", "sets/bolt/test/1.png", "sets/bolt/test/bent/1.png")
    assert main(["sets/bolt/test", *tiny[1:]]) == 0
    assert "are compared with words for 'bolt'" in capsys.readouterr().err


@pytest.mark.slow
def test_verdicts_and_regions(tiny: list[str]) -> None:
    touch_images(Path.cwd(), *(f"data/bolt/{index}.png" for index in range(6)))
    assert main(tiny) == 0
    assert CategoryRecord.from_json(Path("out/bolt/category.json").read_text()).bounds is None  # too few images
    assert main([*tiny, "--threshold", "0.7", "--output", "some"]) == 0
    record = CategoryRecord.from_json(Path("some/bolt/category.json").read_text())
    accepted = [np.asarray(Image.open(Path("some/bolt") / i.map)).ravel() for i in record.images if i.score <= 0.7]
    region = pytest.approx(np.percentile(np.concatenate(accepted), 99.9))
    assert record.bounds == Bounds(0.7, 0.7, "--threshold", region)
    for image in record.images:
        largest = np.asarray(Image.open(Path("some/bolt") / image.map)).max()
        assert bool(image.regions) <= (image.verdict == "reject" and largest > record.bounds.region)
    assert any(image.regions for image in record.images)


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_the_middle_square_alone(tiny: list[str], shape: tuple[int, int]) -> None:
    """What the middle square gives, where it lies in the image, and nothing beside it."""
    with Path("tiny.toml").open("a") as file:
        file.write('[winclip]\nresize = "shortest_crop"\n')
    shutil.move("data/nut", "nut")
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    middle = (slice(32, 128), slice(None)) if shape[0] > shape[1] else (slice(None), slice(32, 128))
    for name, picture in (("0", pixels), ("1", pixels[middle])):
        Image.fromarray(picture).save(f"data/bolt/{name}.png")
    assert main([*tiny, "--format", "zsad,rayan"]) == 0
    record = CategoryRecord.from_json(Path("out/bolt/category.json").read_text())
    whole, square = sorted(record.images, key=lambda image: image.path)
    assert whole.raw_score == pytest.approx(square.raw_score, abs=1e-6)
    of_whole, of_square = (np.array(Image.open(Path("out/bolt") / image.map)) for image in (whole, square))
    np.testing.assert_allclose(of_whole[middle], of_square, atol=1e-6)
    assert of_square.all()
    of_whole[middle] = 0
    assert not of_whole.any()


@pytest.mark.slow
def test_known_good_images_within_a_memory_limit(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    touch_images(Path.cwd(), *(f"good/{index}.png" for index in range(4)), seed=10)
    few = [*tiny, "--device", "cpu", "--reference", "good"]
    assert main([*few, "--memory-limit", "1MB"]) == 2
    said = capsys.readouterr().err
    assert "bolt: comparing with 4 known-good images needs at least" in said
    assert said.rstrip().endswith("raise --memory-limit, or make the work smaller with --image-size or --shots")
    least = int(re.findall(r"at least (\d+) MiB", said)[0])
    assert main([*few, "--memory-limit", f"{least + 1}MB", "--output", "small"]) == 0
    assert main(few) == 0
    one, two = (CategoryRecord.from_json(Path(out, "bolt/category.json").read_text()) for out in ("out", "small"))
    assert [image.raw_score for image in one.images] == [image.raw_score for image in two.images]


class Remembering(TextGuided):
    """A method whose network gives random tokens."""

    def __init__(self, references: int, limit: int | None = None) -> None:
        self._graph = SimpleNamespace(outputs={"tokens": TensorSpec((3, 100, 64), np.dtype(np.float32))})
        self._remembered, self._place = ("tokens",), SimpleNamespace(arrays=HostArrays((), limit))

    def _run(self, batch: int) -> Iterator[tuple[slice, dict[str, np.ndarray]]]:
        tokens = np.random.default_rng(batch).normal(size=(2, 3, 100, 64)).astype(np.float32)
        yield slice(0, 2), {"embedding": tokens[:, 0, 0], "tokens": tokens}


@pytest.mark.parametrize("limited", [False, True])
def test_vectors_of_known_good_images_are_there_once(limited: bool) -> None:
    """And once more as they are searched, where that fits."""
    method = Remembering(200)
    size = 200 * 3 * 100 * 64 * 4
    assert method.needed(0, 200) - method.needed(0, 100) == size // 2
    method = Remembering(200, method.needed(0, 200) if limited else None)
    tracemalloc.start()
    try:
        memories = method._remember(Group(0, "bolt", range(100), 200))["tokens"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (1.2 if limited else 2.2) * size
    tokens = next(method._run(7))[1]["tokens"]
    for layer, memory in enumerate(memories):
        cosines, indices = memory.search(tokens[1, layer])
        np.testing.assert_allclose(cosines, 1, atol=1e-5)
        assert indices[:, 0].tolist() == list(range(15 * 100, 16 * 100))


def test_fewer_known_good_images_than_there_were_files() -> None:
    (memory,) = Remembering(9)._remember(Group(0, "bolt", range(2), 9))["tokens"][:1]
    _, indices = memory.search(np.zeros((1, 64), np.float32))
    assert 0 <= indices[0, 0] < 2 * 2 * 100


@pytest.mark.slow
def test_damaged_text_vectors_are_made_anew(tiny: list[str], cache: Path) -> None:
    before = set((cache / "text").glob("*"))
    assert main([*tiny, "--object", "rod"]) == 0
    (vectors,) = set((cache / "text").iterdir()) - before
    vectors.write_bytes(b"")
    assert main([*tiny, "--object", "rod"]) == 0


@pytest.mark.slow
def test_images_of_one_pixel_and_one_colour(tiny: list[str]) -> None:
    Image.new("RGB", (1, 1)).save("data/bolt/dot.png")
    Image.fromarray(np.full((40, 40), 200, np.uint8)).save("data/bolt/plain.png")
    touch_images(Path.cwd(), "good/0.png", seed=10)
    assert main(tiny) == 0
    assert main([*tiny, "--reference", "good"]) == 0
    assert images_of("bolt") == 4


def test_options_of_other_methods(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny, "--degrees", "3"]) == 2
    assert "--degrees is nothing for preset winclip, whose method is winclip" in capsys.readouterr().err
    assert main([*tiny, "--group-size", "2"]) == 2
    assert "method winclip judges every image by itself; leave out --group-size" in capsys.readouterr().err
    assert main(["data", "--object", "nut"]) == 2
    assert "--object is nothing for preset small, whose method is musc" in capsys.readouterr().err


@pytest.mark.slow
def test_a_head_of_another_network(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(ARRAYS / "april_head.pth", "head.pth")
    with Path("tiny.toml").open("a") as file:
        file.write('taps = [1, 2, 3, 5]\n[april_gan]\nhead = "head.pth"\n')
    assert main(["data", "--preset", "april-gan", "--config", "tiny.toml"]) == 2
    assert "it was trained with another network" in capsys.readouterr().err
