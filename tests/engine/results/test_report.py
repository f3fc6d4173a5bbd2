"""The report: hostile names stay text, nothing is loaded, and the page does in a real browser what it promises."""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from zsad.engine.results import report as module
from zsad.engine.results.records import CategoryRecord, CheckpointRecord, Failure, ImageRecord, RunRecord
from zsad.engine.results.report import TEMPLATE, ShownCategory, ShownImage, write_report
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
    return ShownImage(record, **{"label": None, "anomalous": None, **shown}, image=picture, overlay=picture)


def make_category(name: str, images: list[ShownImage], **fields: Any) -> ShownCategory:
    metrics = fields.pop("metrics", None)
    record = CategoryRecord(name, groups=1, seconds=1.5, **fields)
    return ShownCategory(record, images, metrics, None)


def make_run(images: int, **fields: Any) -> RunRecord:
    run = RunRecord(
        version="0.1.0",
        preset="small",
        method="musc",
        device="CPU",
        runtime="a library",
        started="2025-01-31 12:00:00",
        seconds=3.0,
        images=images,
        not_compared=0,
        failed=0,
        images_per_second=images / 3.0,
        peak_memory_bytes=2**30,
        device_memory_bytes=None,
        stages={"decode": 1.0, "networks": 2.0},
        library_share=0.5,
        config={"size": 518},
        checkpoints=[CheckpointRecord("dinov2_vits14", "0" * 64)],
        versions={},
        categories=[],
        metrics=None,
        notes=[],
    )
    return replace(run, **fields)


def read_data(page: str) -> Any:
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(block)


def test_hostile_names_stay_data(tmp_path: Path) -> None:
    names = [*HOSTILE, UNDECODABLE]
    images = [make_image(name, 0.5, rank) for rank, name in enumerate(names, 1)]
    values = dict.fromkeys(names, 1.0)
    run = make_run(len(images), notes=names, config=values, stages=values)
    write_report(tmp_path / "report.html", run, [make_category(HOSTILE[1], images)])
    page = (tmp_path / "report.html").read_text(encoding="ascii")
    for tag in ("<script", "</script", "<img", "<!--"):
        assert page.count(tag) == TEMPLATE.read_text(encoding="utf-8").count(tag)
    data = read_data(page)
    assert [image["path"] for image in data["categories"][0]["images"]] == names
    assert data["categories"][0]["name"] == HOSTILE[1]


def test_overlay_links_stay_beside_the_page(tmp_path: Path) -> None:
    links = ["javascript:alert(1)", "//host/a.png", "a b/c?d#e.png", UNDECODABLE, ""]
    images = [make_image("a.png", 0.5, rank, overlay_file=link) for rank, link in enumerate(links, 1)]
    write_report(tmp_path / "report.html", make_run(len(images)), [make_category("a", images)])
    data = read_data((tmp_path / "report.html").read_text(encoding="ascii"))
    written = [image["overlay_file"] for image in data["categories"][0]["images"]]
    assert written == [
        "./a/javascript%3Aalert%281%29",
        "./a///host/a.png",
        "./a/a%20b/c%3Fd%23e.png",
        "./a/caf%E9.png",
        "",
    ]


def test_page_names_no_other_place() -> None:
    text = TEMPLATE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]+\.|url\(|@import|\bfetch\(|XMLHttpRequest|innerHTML|eval\(", text)
    assert re.findall(r'<(?:link|script|img)[^>]*(?:src|href)="([^"]*)"', text) == ["data:,"]
    assert "default-src 'none'; img-src data:;" in text


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
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no Chromium with chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-quic",
        "window-size=1280,900",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


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
    text = browser.execute_script("return document.body.textContent.replace(/{[^]*}/, '')")
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


def recorded(name: str, images: list[ShownImage]) -> ShownCategory:
    """A category whose images are on record, as those of a run are."""
    return ShownCategory(CategoryRecord(name, images=[image.record for image in images]), images, None, None)


@pytest.fixture
def small_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 10 images and 3000 characters were many."""
    monkeypatch.setattr(module, "PICTURED", 10)
    monkeypatch.setattr(module, "BLOCK", 3000)


@pytest.mark.usefixtures("small_page")
def test_pictures_of_both_ends_and_blocks_of_bounded_size(tmp_path: Path) -> None:
    counts = {"large": 20, "small": 3, "larger": 30}
    categories = [recorded(name, numbered_images(count)) for name, count in counts.items()]
    write_report(tmp_path / "report.html", make_run(53), categories)
    page = (tmp_path / "report.html").read_text(encoding="ascii")
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert len(blocks) > 3
    longest = max(len(json.dumps(image)) for image in read_data(page)["categories"][0]["images"])
    assert max(map(len, blocks[1:])) < 3000 + 2 * longest
    data = read_data(page)
    for block in map(json.loads, blocks[1:]):
        data["categories"][block["category"]]["images"] += block["images"]
    assert data["pictured"] == 3  # 10 - 3 = 7 for two
    for (name, count), category in zip(counts.items(), data["categories"], strict=True):
        assert category["name"] == name
        assert [image["rank"] for image in category["images"]] == list(range(1, count + 1))
        shown = [image["rank"] for image in category["images"] if image["image"] and image["overlay"]]
        assert shown == [1, 2, count]


@pytest.mark.parametrize(
    ("counts", "share"), [([], 0), ([10], 10), ([11], 10), ([4, 6], 6), ([1, 20, 20], 4), ([3] * 20, 0)]
)
@pytest.mark.usefixtures("small_page")
def test_categories_share_the_pictures_of_a_page(counts: list[int], share: int) -> None:
    assert module._share(counts) == share


@pytest.mark.slow
@pytest.mark.usefixtures("small_page")
def test_a_large_report_lists_all_and_says_what_it_leaves_out(browser: Any, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", make_run(30), [recorded("a", numbered_images(30))])
    browser.get((tmp_path / "report.html").as_uri())
    assert find(browser, "#count").text == "30 of 30 images"
    assert "pictures of 10 images of a category at most" in find(browser, "[data-testid=pictured]").text
    assert len(browser.find_elements("css selector", ".card img")) == 20
    assert not find(browser, "#unread").is_displayed()
    middle = browser.find_elements("css selector", ".card")[15]
    assert "Not in this page" in middle.text
    middle.click()
    assert find(browser, "#view-pictures a").get_attribute("href").endswith("/a/overlays/00016.png")
    assert browser.get_log("browser") == []


def test_a_report_that_cannot_be_read_says_so(browser: Any, page: Any, tmp_path: Path) -> None:
    assert not find(page, "#unread").is_displayed()
    assert not find(page, "[data-testid=pictured]").is_displayed()
    text = (tmp_path / "report.html").read_text()
    (tmp_path / "damaged.html").write_text(text.replace('"pictured":', '"pictured"', 1))
    browser.get((tmp_path / "damaged.html").as_uri())
    assert "scores.csv" in find(browser, "#unread").text
    assert "SyntaxError" in browser.get_log("browser")[0]["message"]


@pytest.mark.slow
def test_a_report_of_more_images_than_a_string_holds(browser: Any, tmp_path: Path) -> None:
    """Without pictures left out and blocks of their own, 18,000 images of 30 KB are an empty page."""
    picture = "data:image/jpeg;base64," + "/9j/" * 3850
    images = [replace(image, image=picture, overlay=picture) for image in numbered_images(18000)]
    path = tmp_path / "report.html"
    write_report(path, make_run(18000), [recorded("a", images)])
    browser.get(path.as_uri())
    assert find(browser, "#count").text == "18000 of 18000 images"
    assert path.stat().st_size < 2**28
