"""The report: hostile names stay text, nothing foreign is loaded, and a real browser does with it what it promises."""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from zsad.bench.report import OPENED, chromium, drawn_categories, drawn_run, heap, memory
from zsad.engine.images.tree import is_export
from zsad.engine.results import report as module
from zsad.engine.results import report_images
from zsad.engine.results.records import CategoryRecord, CheckpointRecord, Failure, ImageRecord, RunRecord
from zsad.engine.results.report import TEMPLATE, write_report
from zsad.engine.results.report_images import ShownCategory, ShownImage
from zsad.engine.scores.verdicts import Bounds, Region

HOSTILE = [
    "<img src=x onerror=alert(1)>.png",
    "</script><script>window.hacked=1</script>.png",
    "<!--<script>.png",
    "\u2028\u2029&lt;\"'`${window.hacked=1}.png",
    "javascript:window.hacked=1",
]
UNDECODABLE = "caf\udce9.png"  # a byte that is no UTF-8, as Python spells it


def make_image(path: str, score: float, rank: int, **fields: Any) -> ShownImage:
    jpeg = cv2.imencode(".jpg", np.full((16, 16, 3), int(255 * score), np.uint8))[1].tobytes()
    picture = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    shown = {key: fields.pop(key) for key in ("label", "anomalous") if key in fields}
    record = ImageRecord(path, score, score / 2, rank, **{"overlay_file": f"overlays/{path}", **fields})
    pictures = {"image": picture, "overlay": picture}
    return ShownImage(record, **{"label": None, "anomalous": None, **shown}, pictures=pictures)


def make_category(name: str, images: list[ShownImage], **fields: Any) -> ShownCategory:
    metrics = fields.pop("metrics", None)
    record = CategoryRecord(name, images=[image.record for image in images], groups=1, seconds=1.5, **fields)
    return ShownCategory(record, images, metrics, None)


def make_run(images: int, **fields: Any) -> RunRecord:
    checkpoints = [CheckpointRecord("dinov2_vits14", "0" * 64)]
    return replace(drawn_run(images), **{"config": {"size": 518}, "checkpoints": checkpoints, **fields})


def read_block(page: str, name: str) -> Any:
    (block,) = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    return json.loads(block)


def test_hostile_names_stay_data(tmp_path: Path) -> None:
    names = [*HOSTILE, UNDECODABLE]
    images = [make_image(name, 0.5, rank) for rank, name in enumerate(names, 1)]
    values = dict.fromkeys(names, 1.0)
    run = make_run(len(images), notes=names, config=values, stages=values)
    write_report(tmp_path / "report.html", run, [make_category(HOSTILE[1], images)])
    page = (tmp_path / "report.html").read_text(encoding="ascii")
    blocks = ["numbers-0", "images-0", "paths-0"]
    for tag, more in (("<script", blocks), ("</script", blocks), ("<img", []), ("<!--", [])):
        assert page.count(tag) == TEMPLATE.read_text(encoding="utf-8").count(tag) + len(more)
    assert [image["path"] for image in read_block(page, "images-0")] == names
    assert read_block(page, "paths-0") == names
    assert read_block(page, "data")["categories"][0]["name"] == HOSTILE[1]


def test_overlay_links_stay_beside_the_page(tmp_path: Path) -> None:
    links = ["javascript:alert(1)", "//host/a.png", "a b/c?d#e.png", UNDECODABLE, ""]
    images = [make_image("a.png", 0.5, rank, overlay_file=link) for rank, link in enumerate(links, 1)]
    write_report(tmp_path / "report.html", make_run(len(images)), [make_category("a", images)])
    shown = read_block((tmp_path / "report.html").read_text(encoding="ascii"), "images-0")
    written = [image["overlay_file"] for image in shown]
    assert written == [
        "./a/javascript%3Aalert%281%29",
        "./a///host/a.png",
        "./a/a%20b/c%3Fd%23e.png",
        "./a/caf%E9.png",
        "",
    ]


def test_page_names_no_other_place(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", make_run(0), [])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]+\.|url\(|@import|\bfetch\(|XMLHttpRequest|innerHTML|eval\(", text)
    assert re.findall(r'<(?:link|script|img)[^>]*(?:src|href)="([^"]*)"', text) == ["data:,"]
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in text
    assert re.search(r"script-src 'sha256-[^ ;]+'; base-uri 'none'\"", text)


def test_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(path, make_run(1, seconds=float("nan")), [])

    opened = Path.open

    def fill_disk(self: Path, mode: str = "r", **options: Any) -> Any:
        if mode == "w":
            self.touch()
            raise OSError("No space left on device")
        return opened(self, mode, **options)

    monkeypatch.setattr(Path, "open", fill_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(path, make_run(0), [])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_replaces_the_old_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, make_run(0), [])
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with ExitStack() as stack:
        try:
            driver = stack.enter_context(chromium(tmp_path_factory.mktemp("chromium")))
        except RuntimeError as error:
            pytest.skip(str(error))
        yield driver


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The browser with a report of 150 bolts with ground truth, a few hostile names without, and no complaint."""
    bolts = []
    for index in range(150):
        bad = index % 15 == 0
        fields = {
            "label": "bent" if bad else "good",
            "anomalous": bad,
            "verdict": "reject" if bad else "review" if index % 15 == 1 else "accept",
            "regions": [Region(1, 2, 3, 4, 11, peak=0.9)] if bad else [],
        }
        bolts.append(make_image(f"test/bolt_{index:03d}.png", (0.81 if bad else 0.01) + index / 1000, 0, **fields))
    ranked = sorted(bolts, key=lambda each: -each.record.score)
    bolts = [replace(each, record=replace(each.record, rank=ranked.index(each) + 1)) for each in bolts]
    hostile = [make_image(name, 0.3 + rank / 100, rank) for rank, name in enumerate(HOSTILE, 1)]
    bounds = Bounds(0.01, 0.5, "rule")
    categories = [
        make_category("bolt", bolts, metrics={"image_auroc": 0.9876, "pixel_f1": None}, bounds=bounds),
        make_category(HOSTILE[0], hostile, failures=[Failure(HOSTILE[1], HOSTILE[0])]),
    ]
    run = make_run(155, notes=HOSTILE, config=dict.fromkeys(HOSTILE, 1))
    write_report(tmp_path / "report.html", run, categories)
    browser.get((tmp_path / "report.html").as_uri())
    yield browser
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hacked") is None
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


def find(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def card_values(page: Any, key: str) -> list[str]:
    script = "return [...document.querySelectorAll('[data-testid=card]')].map((card) => card.dataset[arguments[0]])"
    values: list[str] = page.execute_script(script, key)
    return values


def set_value(page: Any, selector: str, value: str) -> None:
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', { bubbles: true }))"
    page.execute_script(script, find(page, selector), value)


@pytest.mark.slow
def test_cards_are_sorted_and_made_when_needed(page: Any) -> None:
    scores = [float(score) for score in card_values(page, "score")]
    assert scores == sorted(scores, reverse=True)
    assert 0 < len(scores) < 155
    assert find(page, "#count").text == "155 of 155 images"
    deadline = time.monotonic() + 20
    while len(card_values(page, "score")) < 155 and time.monotonic() < deadline:
        page.execute_script("scrollTo(0, document.body.scrollHeight)")
        time.sleep(0.05)
    assert len(card_values(page, "score")) == 155
    set_value(page, "#sort", "low")
    scores = [float(score) for score in card_values(page, "score")]
    assert scores == sorted(scores)
    set_value(page, "#sort", "path")
    paths = card_values(page, "path")  # read once: more cards may come at any time
    assert paths == sorted(paths)


@pytest.mark.slow
def test_a_page_of_images_as_they_arrive_has_the_latest_first_and_loads_itself_again(
    browser: Any, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    images = [make_image(f"{number}.png", score, 0) for number, score in enumerate((0.9, 0.1, 0.5))]
    category = make_category("bolt", images)
    category = replace(category, record=replace(category.record, groups=0))
    write_report(path, make_run(3), [category], refresh=0.3)
    browser.get(path.as_uri())
    browser.execute_script("document.querySelector('.card').click()")
    assert find(browser, "#view-path").text == "2.png"
    text = browser.execute_script("return document.body.innerText")
    assert not any(word in text for word in ("Groups", "Rank", "undefined", "#0", "NaN"))
    find(browser, "#view-close").click()  # else it stays as it is
    assert card_values(browser, "path") == ["2.png", "1.png", "0.png"]
    more = [*images, make_image("3.png", 0.2, 0)]
    write_report(path, make_run(4), [make_category("bolt", more)], refresh=0.3)
    deadline = time.monotonic() + 20
    while len(card_values(browser, "path")) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert card_values(browser, "path") == ["3.png", "2.png", "1.png", "0.png"]
    assert browser.get_log("browser") == []
    browser.get("about:blank")


@pytest.mark.slow
def test_filters_narrow_the_gallery(page: Any) -> None:
    set_value(page, "#filter-category", "0")
    assert find(page, "#count").text == "150 of 155 images"
    assert set(card_values(page, "category")) == {"bolt"}
    set_value(page, "#filter-low", "0.5")
    assert find(page, "#count").text == "10 of 155 images"
    assert all(float(score) >= 0.5 for score in card_values(page, "score"))
    set_value(page, "#filter-high", "0.89")
    assert find(page, "#count").text == "6 of 155 images"
    set_value(page, "#filter-verdict", "accept")
    assert find(page, "#count").text == "0 of 155 images"
    assert find(page, "#empty").is_displayed()
    find(page, "#reset").click()
    assert find(page, "#count").text == "155 of 155 images"
    set_value(page, "#filter-text", "BOLT_01")
    assert find(page, "#count").text == "10 of 155 images"
    set_value(page, "#filter-label", "anomalous")
    assert card_values(page, "path") == ["test/bolt_015.png"]
    find(page, "#reset").click()
    for verdict, count in (("reject", 10), ("review", 10), ("accept", 130), ("not accept", 20)):
        set_value(page, "#filter-verdict", verdict)
        assert find(page, "#count").text == f"{count} of 155 images"  # those without a verdict are none of these


@pytest.mark.slow
def test_histogram_counts_and_chooses(page: Any) -> None:
    counts = "return [...document.querySelectorAll('[data-testid=bin]')].map((bin) => Number(bin.dataset.count))"
    assert sum(page.execute_script(counts)) == 155
    assert page.find_elements("css selector", "[data-testid=bound]") == []  # the categories do not share one
    set_value(page, "#filter-category", "0")
    assert len(page.find_elements("css selector", "[data-testid=bound]")) == 2
    assert find(page, "#histogram-key").text.splitlines()[-2:] == ["accept up to 0.010", "reject above 0.500"]
    assert sum(page.execute_script(counts)) == 150
    first = page.execute_script(counts)[0]
    find(page, "[data-testid=bin]").click()
    assert find(page, "#count").text == f"{first} of 155 images"
    find(page, "[data-testid=bin]").click()
    assert find(page, "#count").text == "150 of 155 images"


@pytest.mark.slow
def test_panels_tell_metrics_failures_and_run(page: Any) -> None:
    metrics = find(page, "[data-testid=categories]").text
    assert "AUROC" in metrics
    assert "0.988" in metrics
    for panel, words in (("failures", HOSTILE[:2]), ("run", ["networks", "0" * 64, HOSTILE[0]])):
        find(page, f"[data-testid={panel}] summary").click()
        text = find(page, f"[data-testid={panel}]").text
        assert all(word in text for word in words)


@pytest.mark.slow
def test_large_view_steps_with_the_arrows(page: Any) -> None:
    find(page, "[data-testid=card]").click()
    view = find(page, "[data-testid=view]")
    assert view.is_displayed()
    best, second = card_values(page, "path")[:2]
    assert find(page, "#view-path").text == best
    assert "0.900" in find(page, "#view-regions").text
    assert find(page, "#view-pictures a").get_attribute("href").endswith(f"/overlays/{best}")
    body = find(page, "body")
    page.switch_to.active_element.send_keys("\ue014")  # right
    assert find(page, "#view-path").text == second
    page.switch_to.active_element.send_keys("\ue012")  # left
    assert find(page, "#view-path").text == best
    page.switch_to.active_element.send_keys("\ue00c")  # escape
    assert not view.is_displayed()
    assert page.switch_to.active_element != body  # back on the card


@pytest.mark.slow
def test_hostile_names_are_shown_as_they_are(page: Any) -> None:
    set_value(page, "#filter-category", "1")
    shown = [element.text for element in page.find_elements("css selector", ".card .path")]
    assert HOSTILE[0] in shown
    assert HOSTILE[1] in shown
    assert page.find_elements("css selector", "[onerror]") == []
    for card in page.find_elements("css selector", ".card"):
        card.click()
        find(page, "#view-close").click()


@pytest.mark.slow
def test_undecodable_name_opens(browser: Any, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", make_run(1), [make_category("a", [make_image(UNDECODABLE, 0.5, 1)])])
    browser.get((tmp_path / "report.html").as_uri())
    # chromedriver itself cannot speak of such a name, so the page clicks.
    browser.execute_script("document.querySelector('.card').click()")
    href = browser.execute_script("return document.querySelector('#view-pictures a').href")
    assert href.endswith("/overlays/caf%E9.png")
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_of_many_failures_a_thousand_are_listed(browser: Any, tmp_path: Path) -> None:
    failures = [Failure(f"{number}.png", "not an image") for number in range(1002)]
    write_report(tmp_path / "report.html", make_run(0), [make_category("a", [], failures=failures)])
    browser.get((tmp_path / "report.html").as_uri())
    find(browser, "[data-testid=failures] summary").click()
    assert len(browser.find_elements("css selector", "[data-testid=failures] tbody tr")) == 1000
    assert find(browser, "[data-testid=failures]").text.endswith("2 more are in run.json.")


def test_report_of_nothing_opens(browser: Any, tmp_path: Path) -> None:
    failures = [Failure("a.png", "not an image")]
    write_report(tmp_path / "report.html", make_run(0), [make_category("a", [], failures=failures)])
    browser.get((tmp_path / "report.html").as_uri())
    assert find(browser, "#count").text == "0 of 0 images"
    assert find(browser, "[data-testid=failures]").is_displayed()
    assert browser.get_log("browser") == []


def numbered_images(count: int, **fields: Any) -> list[ShownImage]:
    return [make_image(f"{rank:05d}.png", 1 - rank / count, rank, **fields) for rank in range(1, count + 1)]


@pytest.fixture
def small_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 10 images were many, and parts of the data small."""
    monkeypatch.setattr(module, "ALONE", 10)
    for limits in (module, report_images):
        monkeypatch.setattr(limits, "PART", 4)
        monkeypatch.setattr(limits, "NUMBERS", 12)
    monkeypatch.setattr(report_images, "FILES", 3)


def read_part(files: Path, name: str) -> Any:
    script = (files / f"{name}.js").read_text("ascii")
    start, end = f"take('{name}', '", "');\n"
    assert script.startswith(start)
    assert script.endswith(end)
    text = script[len(start) : -len(end)]
    assert not re.search(r"(?<!\\)(\\\\)*'|\n", text)
    return json.loads(text.replace("\\'", "'").replace("\\\\", "\\"))


@pytest.mark.usefixtures("small_page")
def test_a_report_of_many_images_is_a_small_page_and_a_folder_of_its_own(tmp_path: Path) -> None:
    counts = {HOSTILE[3]: 13, "empty": 0, "large": 20}
    categories = [make_category(name, numbered_images(count)) for name, count in counts.items()]
    path, files = tmp_path / "report.html", tmp_path / "report_files"
    for number in (1, 2, 1):  # in turn, so that the earlier page keeps its files until this one is there
        write_report(path, make_run(33), categories)
        page = path.read_text(encoding="ascii")
        data = read_block(page, "data")
        assert data["folder"] == f"report_files/{number}"
        assert {each.name for each in files.iterdir()} == {"format.json", str(number)}
    assert is_export(files)
    assert page.count("application/json") == 1
    numbers = [read_part(files / "1", f"numbers-{part}") for part in range(3)]
    images = [image for part in range(9) for image in read_part(files / "1", f"images-{part}")]
    scores = [score for part in numbers for score in part["scores"]]
    assert scores == sorted((image.record.score for each in categories for image in each.images), reverse=True)
    paths = [path for part in range(3) for path in read_part(files / "1", f"paths-{part}")]
    assert paths == [image["path"] for image in images]
    places = [place for part in numbers for place in part["categories"]]
    for place, (name, count) in enumerate(counts.items()):
        own = [image for image, at in zip(images, places, strict=True) if at == place]
        assert data["categories"][place]["name"] == name
        assert [image["rank"] for image in own] == list(range(1, count + 1))
        for image, made in zip(own, categories[place].images, strict=True):
            content = base64.b64decode(made.pictures["image"].partition(",")[2])
            assert (tmp_path / image["image"]).read_bytes() == (tmp_path / image["overlay"]).read_bytes() == content
    write_report(path, make_run(10), [make_category("a", numbered_images(10))])
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.usefixtures("small_page")
def test_a_folder_that_cannot_be_written_leaves_the_page_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, many = tmp_path / "report.html", [make_category("a", numbered_images(30))]
    (tmp_path / "report_files").mkdir()
    (tmp_path / "report_files/mine.txt").touch()
    with pytest.raises(OSError, match="not empty"):
        write_report(path, make_run(30), many)
    shutil.rmtree(tmp_path / "report_files")
    write_report(path, make_run(30), many)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    written = Path.write_text

    def fill_disk(self: Path, *arguments: Any) -> int:
        if self.name == "images-5.js":
            raise OSError("No space left on device")
        return written(self, *arguments)

    monkeypatch.setattr(Path, "write_text", fill_disk)
    with pytest.raises(OSError, match="No space"):
        write_report(path, make_run(30), many)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.slow
@pytest.mark.usefixtures("small_page")
def test_next_to_nothing_is_held_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "flush_all", lambda _: None)  # holds what belongs to a thousand files at once

    def peak(images: int) -> int:
        categories = drawn_categories(images, pictured=0.99)
        tracemalloc.start()
        try:
            write_report(tmp_path / "report.html", make_run(images), categories)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(40)  # what is made once
    assert peak(400) - peak(40) < 100 * 360  # its facts alone take more


def wait_for(browser: Any, script: str, value: Any) -> None:
    deadline = time.monotonic() + 60
    while (found := browser.execute_script(f"return {script}")) != value and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found == value


COUNT, CARDS = "document.querySelector('#count').textContent", "document.querySelectorAll('.card').length"

# Of pages that are opened from now on: the addresses of all scripts and pictures that they come to have.
WATCH = """
window.asked = [];
new MutationObserver((changes) => {
  for (const node of changes.flatMap((change) => [...change.addedNodes])) {
    const own = node.matches?.("script, img") ? [node] : [...(node.querySelectorAll?.("script, img") ?? [])];
    window.asked.push(...own.map((each) => each.src).filter(Boolean));
  }
}).observe(document, { childList: true, subtree: true });
"""


def files_asked_for(browser: Any, path: Path) -> list[str]:
    """Open a page and return the names of the scripts and pictures that it asks for until its cards are there."""
    watching = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    try:
        browser.get(path.as_uri())
        browser.execute_async_script(OPENED)
        return [address.rpartition("/")[2] for address in browser.execute_script("return window.asked")]
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", watching)


@pytest.mark.slow
@pytest.mark.usefixtures("small_page")
def test_a_page_with_a_folder_reads_what_it_is_asked_for(browser: Any, tmp_path: Path) -> None:
    images = [replace(image, label="good", anomalous=False) for image in numbered_images(300)]
    images[7] = replace(images[7], label="bent", anomalous=True, record=replace(images[7].record, path=HOSTILE[1]))
    write_report(tmp_path / "report.html", make_run(300), [make_category(UNDECODABLE, images)])
    read = files_asked_for(browser, tmp_path / "report.html")
    assert len(card_values(browser, "path")) == 60
    assert sum(name.startswith("numbers-") for name in read) == 25
    assert {name for name in read if name.endswith(".js") and "numbers" not in name} == {
        f"images-{part}.js" for part in range(15)
    }
    assert card_values(browser, "path")[7] == HOSTILE[1]
    assert browser.execute_script("return document.querySelector('.card img').naturalWidth") == 16
    set_value(browser, "#filter-label", "anomalous")
    wait_for(browser, COUNT, "1 of 300 images")
    find(browser, "#reset").click()
    set_value(browser, "#filter-text", "0029")
    wait_for(browser, COUNT, "11 of 300 images")
    wait_for(browser, CARDS, 11)
    assert card_values(browser, "path") == [f"{number:05d}.png" for number in (29, *range(290, 300))]
    find(browser, "#reset").click()
    wait_for(browser, COUNT, "300 of 300 images")
    wait_for(browser, "document.querySelector('#page-last').textContent", "of 2")
    find(browser, "#page-next").click()
    wait_for(browser, CARDS, 60)
    assert card_values(browser, "path")[0] == "00241.png"
    find(browser, ".card").click()
    wait_for(browser, "document.querySelector('dialog[open] #view-path')?.textContent", "00241.png")
    browser.switch_to.active_element.send_keys("\ue012")  # left, onto the page before
    wait_for(browser, "document.querySelector('#view-path').textContent", "00240.png")
    browser.switch_to.active_element.send_keys("\ue00c")  # escape
    wait_for(browser, "document.activeElement.dataset.path", "00240.png")
    wait_for(browser, "document.querySelector('#page-number').value", "1")
    set_value(browser, "#sort", "low")
    wait_for(browser, "document.querySelector('.card')?.dataset.path", "00300.png")
    assert browser.execute_script("return window.hacked") is None
    assert browser.get_log("browser") == []


@pytest.mark.slow
@pytest.mark.usefixtures("small_page")
def test_a_page_without_its_folder_says_so(browser: Any, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", make_run(30), [make_category("a", numbered_images(30))])
    (tmp_path / "report_files").rename(tmp_path / "elsewhere")
    browser.get((tmp_path / "report.html").as_uri())
    wait_for(browser, "document.querySelector('#unread').textContent.includes('belongs beside this page')", True)
    assert "ERR_FILE_NOT_FOUND" in str(browser.get_log("browser"))


@pytest.mark.long
def test_a_hundred_thousand_images_open_in_little_memory(browser: Any, tmp_path: Path) -> None:
    count = 100_000
    write_report(tmp_path / "report.html", make_run(count), drawn_categories(count, pictured=0.97))
    browser.get("about:blank")
    before = memory(browser)
    read = files_asked_for(browser, tmp_path / "report.html")
    assert sum(name.endswith(".js") for name in read) <= 5 + 3  # all numbers, and the facts of the first images
    assert sum(name.endswith(".jpg") for name in read) <= 2 * 240
    assert memory(browser) - before < 200e6
    assert heap(browser) < 30e6
    set_value(browser, "#sort", "path")
    wait_for(browser, "document.querySelector('.card')?.dataset.path", "test/bent/000000.png")
    set_value(browser, "#filter-text", "/01999")
    wait_for(browser, COUNT, "50 of 100000 images")
    assert heap(browser) < 60e6
    assert memory(browser) - before < 200e6
    assert browser.get_log("browser") == []


def test_a_report_that_cannot_be_read_says_so(browser: Any, page: Any, tmp_path: Path) -> None:
    assert not find(page, "#unread").is_displayed()
    assert not find(page, "[data-testid=pager]").is_displayed()
    text = (tmp_path / "report.html").read_text()
    (tmp_path / "damaged.html").write_text(text.replace('"refresh":', '"refresh"', 1))
    browser.get((tmp_path / "damaged.html").as_uri())
    assert "scores.csv" in find(browser, "#unread").text
    assert "SyntaxError" in browser.get_log("browser")[0]["message"]
