"""What is on record of a run: of each image, of each category, and of the whole; kept as JSON beside the results."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from zsad.engine.evaluation.evaluate import Evaluation
from zsad.engine.scores.verdicts import Region


@dataclass(frozen=True)
class ImageRecord:
    """Scores of one image, and its files relative to the category's folder (empty where there is none)."""

    path: str  # within the category
    score: float  # in [0, 1]
    raw_score: float  # in the method's own units
    rank: int = 0  # 1 is the most anomalous
    verdict: str | None = None  # anomalous or normal; None without a threshold
    width: int | None = None  # pixels; None where the file could not be read again
    height: int | None = None
    map: str = ""
    overlay_file: str = ""
    json_file: str = ""
    regions: list[Region] | None = None  # None without a threshold or a map


@dataclass(frozen=True)
class Failure:
    """A file or folder without results, within its category, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class CategoryRecord:
    """One category, scored and written, or why it is not (no images, then)."""

    name: str
    fingerprint: str = ""  # of everything that decides the results
    images: list[ImageRecord] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    groups: int = 0
    group_size: int | None = None
    scale: tuple[float, float] | None = None  # map values that became 0 and 1
    relative: bool = True  # whether scores depend on the other images of the category
    threshold: float | None = None
    region_threshold: float | None = None
    ignored: dict[str, int] = field(default_factory=dict)  # files that are no images, by suffix
    references: dict[str, str] = field(default_factory=dict)  # known-good images, with the sha256 of their files
    notes: list[str] = field(default_factory=list)  # what was found or decided while reading the images
    seconds: float = 0.0
    resumed: bool = False

    @classmethod
    def from_json(cls, text: str) -> "CategoryRecord":
        """Read a record; raises ValueError for anything else."""
        return _CATEGORY_RECORDS.validate_json(text)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


_CATEGORY_RECORDS = TypeAdapter(CategoryRecord)


@dataclass(frozen=True)
class CheckpointRecord:
    """Weights that a run has used."""

    name: str
    sha256: str


@dataclass(frozen=True)
class RunRecord:
    """A whole run: what `run.json` holds and the report shows."""

    version: str
    preset: str
    method: str
    device: str  # cpu or cuda:N
    runtime: str
    started: str  # UTC
    seconds: float
    images: int  # with a score
    failed: int
    images_per_second: float  # resumed ones not counted
    peak_memory_bytes: int  # of host memory
    device_memory_bytes: int | None
    stages: dict[str, float]  # seconds
    library_share: float  # of the time, in networks and products
    config: dict[str, Any]
    checkpoints: list[CheckpointRecord]
    versions: dict[str, str]
    categories: list[CategoryRecord]
    metrics: Evaluation | None
    notes: list[str]

    def to_json(self) -> str:
        """Return the record without the single images, which are in the records of the categories."""
        content = asdict(self)
        content["categories"] = {
            category["name"]: {
                **{key: value for key, value in category.items() if key not in ("name", "fingerprint")},
                "images": len(category["images"]),
            }
            for category in content["categories"]
        }
        return json.dumps(content, indent=1)
