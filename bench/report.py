"""Reports in Chromium: seconds until they are open, their memory, and how long a filter, a search and a sort take.

    python -m zsad.bench.report --counts 1000,10000,100000

Of drawn images in five categories, of which those with scores above 0.5, a fifth, have pictures, small as files. Each
report is opened three times, by a Chromium that has opened nothing before, and medians are kept. Memory is what all of
its processes hold for themselves and their share of the rest, beyond what they hold with an empty page, and the heap of
the page's script. It takes Selenium, Chromium and chromedriver.
"""

import argparse
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import cv2
import numpy as np
import psutil

from zsad.engine.images.tree import REPORT
from zsad.engine.results.drawing import THUMBNAIL_SIDE, draw_overlay, thumbnail
from zsad.engine.results.records import CategoryRecord, ImageRecord, RunRecord
from zsad.engine.results.report import write_report
from zsad.engine.results.report_images import ShownCategory, ShownImage
from zsad.engine.scores.verdicts import Bounds, Region

from .records import RESULTS, append, environment

CATEGORIES, PICTURES = 5, 40
BOUNDS = Bounds(accept=0.8, reject=0.9, rule="rule")
PATIENCE = 120.0  # seconds that the page may take
TIMES = 3  # that each report is opened
PICTURED = 0.5  # the score from which on images have pictures
SETTLE = 2.0  # seconds after which memory is read

# Chromium as a person would start it, but without a window and without anything of its own on the network.
FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "disable-quic",
    "enable-precise-memory-info",
    "window-size=1280,900",
)

# Both call back with the milliseconds until the first cards and their pictures are there.
OPENED = """
const done = arguments[arguments.length - 1];
(function look() {
  const shown = [...document.querySelectorAll(".card img")];
  if (shown.length && shown.every((image) => image.complete)) done(performance.now());
  else setTimeout(look, 5);
})();
"""
CHANGED = """
const [selector, value, done] = arguments, start = performance.now(), control = document.querySelector(selector);
document.querySelector("#filters").reset();
control.value = value;
control.dispatchEvent(new Event("input", { bubbles: true }));
(function look() {
  const places = [...document.querySelectorAll("#gallery > li")];
  const counted = document.querySelector("#count").textContent.endsWith("images");
  if (counted && places.every((place) => place.firstChild)) done(performance.now() - start);
  else setTimeout(look, 5);
})();
"""


@dataclass(frozen=True)
class DrawnRecords(Sequence[ImageRecord]):
    """Records of images, each made when it is asked for."""

    category: int
    images: int

    def __len__(self) -> int:
        return self.images

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...

    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...

    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(index, slice):
            return [self[each] for each in range(self.images)[index]]
        if not 0 <= index < self.images:
            raise IndexError(index)
        # All ranks, in an order without one: a step that shares no factor with the number of images.
        rank = (index * 7919 + self.category) % self.images + 1 if self.images % 7919 else index + 1
        score = round((1 - (rank - 0.5) / self.images) ** 3, 6)
        return ImageRecord(
            path=f"test/{'bent' if score > BOUNDS.reject else 'good'}/{index:06d}.png",
            score=score,
            raw_score=round(0.2 + score / 4, 6),
            rank=rank,
            verdict=BOUNDS.verdict(score),
            width=1024,
            height=1024,
            overlay_file=f"overlays/{index:06d}.jpg",
            regions=[Region(10, 20, 30, 40, 900, peak=score)] if score > BOUNDS.accept else [],
        )


def drawn_categories(images: int, pictured: float = 0.0) -> list[ShownCategory]:
    """Make up what a report shows of so many images; those with scores above `pictured` have pictures."""
    pictures = _pictures()

    def shown(records: DrawnRecords) -> Iterator[ShownImage]:
        for number, record in enumerate(records):
            bad = record.score > BOUNDS.reject
            own = pictures[number % PICTURES] if record.score >= pictured else {}
            yield ShownImage(record, "bent" if bad else "good", bad, own)

    categories = []
    for category in range(CATEGORIES):
        records = DrawnRecords(category, len(range(category, images, CATEGORIES)))
        record = CategoryRecord(f"part {category + 1}", images=records, groups=1, bounds=BOUNDS, seconds=1.0)
        categories.append(ShownCategory(record, shown(records), {"image_auroc": 1.0}, "official"))
    return categories


def _pictures() -> list[Mapping[str, str]]:
    """Draw images with a blot each, and their maps over them."""
    rng, side = np.random.default_rng(0), THUMBNAIL_SIDE
    pictures = list[Mapping[str, str]]()
    for _ in range(PICTURES):
        texture = cv2.resize(rng.integers(90, 170, (12, 12, 3)).astype(np.uint8), (side, side))
        blot = np.zeros((side, side), np.float32)
        middle = tuple(rng.integers(40, side - 40, 2).tolist())
        cv2.circle(blot, middle, int(rng.integers(8, 30)), 1.0, -1)
        blot = cv2.GaussianBlur(blot, (0, 0), 6).astype(np.float32)
        image = (texture * (1 - 0.7 * blot[:, :, None])).astype(np.uint8)
        pictures.append({"image": thumbnail(image), "overlay": thumbnail(draw_overlay(image, blot))})
    return pictures


def drawn_run(images: int) -> RunRecord:
    """Make up the record of a run over so many images."""
    return RunRecord(
        version="0",
        preset="small",
        method="musc",
        device="CPU",
        runtime="none",
        started="2025-01-31 12:00:00",
        seconds=3.0,
        images=images,
        failed=0,
        not_compared=0,
        images_per_second=images / 3.0,
        peak_memory_bytes=2**30,
        device_memory_bytes=None,
        stages={"decode": 1.0, "networks": 2.0},
        library_share=0.5,
        config={},
        checkpoints=[],
        versions={},
        categories=[],
        metrics=None,
        notes=[],
    )


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """Start a Chromium with a profile folder; raises RuntimeError, saying what is missing, where there is none."""
    try:
        from selenium import webdriver
    except ImportError:
        raise RuntimeError("Selenium is not installed: pip install selenium") from None
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if browser is None or chromedriver is None:
        raise RuntimeError("no Chromium with chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.set_script_timeout(PATIENCE)
    try:
        yield driver
    finally:
        driver.quit()


def heap(driver: Any) -> int:
    """Return the bytes that the page's script holds."""
    driver.execute_cdp_cmd("HeapProfiler.collectGarbage", {})
    return int(driver.execute_script("return performance.memory.usedJSHeapSize"))


def memory(driver: Any) -> int:
    """Return the bytes that all of the browser's processes hold."""
    return sum(_of_processes(driver, lambda process: process.memory_full_info().pss))


def processor_seconds(driver: Any) -> float:
    """Return what all of the browser's processes have taken of the processors' time."""
    return math.fsum(_of_processes(driver, lambda process: sum(process.cpu_times()[:2])))


def _of_processes(driver: Any, fact: Callable[[psutil.Process], Any]) -> Iterator[Any]:
    for process in psutil.Process(driver.service.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            yield fact(process)


def measured(driver: Any, page: Path) -> dict[str, float]:
    """Open a report in a browser that has opened nothing, and use it; returns seconds and bytes by name."""
    driver.get("about:blank")
    time.sleep(SETTLE)
    before, busy = memory(driver), processor_seconds(driver)
    driver.get(page.as_uri())
    figures = {"open_s": driver.execute_async_script(OPENED) / 1e3}
    figures["open_cpu_s"] = processor_seconds(driver) - busy
    time.sleep(SETTLE)
    figures["heap_bytes"], figures["memory_bytes"] = heap(driver), memory(driver) - before
    for name, selector, value in (
        ("filter", "#filter-verdict", "review"),
        ("search", "#filter-text", "0001"),
        ("sort", "#sort", "path"),
    ):
        figures[f"{name}_s"] = driver.execute_async_script(CHANGED, selector, value) / 1e3
    figures["used_heap_bytes"] = heap(driver)
    figures["used_memory_bytes"] = memory(driver) - before
    complaints = driver.get_log("browser")
    if complaints:
        raise RuntimeError(f"the page complains: {complaints[0]['message']}")
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="1000,10000,100000", help="images of each report (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "report.jsonl", help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    record = environment("zsad.bench.report", argv, ["numpy", "selenium"])
    record["runs"] = []
    for count in map(int, arguments.counts.split(",")):
        with tempfile.TemporaryDirectory(prefix="zsad-bench-") as folder:
            page, start = Path(folder, REPORT), time.perf_counter()
            write_report(page, drawn_run(count), drawn_categories(count, PICTURED))
            write_s = time.perf_counter() - start
            opened = []
            for number in range(TIMES):
                with chromium(Path(folder, f"profile-{number}")) as driver:
                    record["chromium"] = driver.capabilities["browserVersion"]
                    opened.append(measured(driver, page))
            medians = {name: statistics.median(each[name] for each in opened) for name in opened[0]}
            record["runs"].append({"images": count, "write_s": write_s, **medians})
        print(record["runs"][-1], flush=True)
    append(arguments.output, record)


if __name__ == "__main__":
    main()
