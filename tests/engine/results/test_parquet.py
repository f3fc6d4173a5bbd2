"""Parquet: what readers get of a run, in one line each."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import draw

from zsad.engine.commands.evaluate import main as evaluate
from zsad.engine.commands.infer import main
from zsad.engine.results import parquet

pytestmark = pytest.mark.slow  # of the libraries, which also take long to import


@pytest.fixture(autouse=True)
def _workplace(workplace: None) -> None:
    """Every test here runs the tiny network in a folder of its own."""
    pytest.importorskip("pyarrow")


@pytest.fixture
def pandas() -> Any:
    return pytest.importorskip("pandas")


@pytest.mark.parametrize(("name", "most"), [("parquet", 0), ("parquet-8bit", 255), ("parquet-16bit", 65535)])
def test_readers_get_what_is_on_record(
    pandas: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    duckdb = pytest.importorskip("duckdb")
    for category in ("007", "a b"):
        (draw(tmp_path / "data" / category, 12) / "broken.png").write_bytes(b"no image")
    monkeypatch.setattr(parquet, "ROWS", 3)
    monkeypatch.setattr(parquet, "PART_ROWS", 6)
    options = ["--group-size", "6", "--format", name, "--config", str(tiny / "config.toml"), "-q"]
    assert main([str(tmp_path / "data"), *options]) == 1
    rows = pandas.read_parquet(f"out/{name}/images")
    assert sorted(rows.category.unique()) == ["007", "a b"]
    assert len(list(Path(f"out/{name}/images").glob("*/*"))) == 6
    by_name = {(row.category, row.path): row for row in rows.itertuples()}
    assert len(by_name) == len(rows) == 26
    for category in ("007", "a b"):
        record = json.loads((Path("out") / category / "category.json").read_text())
        assert by_name[category, "broken.png"].failure == record["failures"][0]["reason"]
        for image in record["images"]:
            row = by_name[category, image["path"]]
            assert (row.score, row.raw_score, row.verdict) == (image["score"], image["raw_score"], image["verdict"])
            assert [dict(region) for region in row.regions] == image["regions"]
            if most:
                scores = np.asarray(Image.open(Path("out") / category / image["map"]))
                read = np.asarray(row.map).reshape(int(row.height), int(row.width)) / most
                np.testing.assert_allclose(read, scores, atol=0.51 / most)
    scored = rows[rows.failure.isna()]
    assert (scored.groupby("category").group.nunique() == 3).all()
    found = duckdb.sql(f"SELECT count(*), max(score) FROM 'out/{name}/images/*/*.parquet' WHERE failure IS NULL")
    assert found.fetchall() == [(24, scored.score.max())]
    assert evaluate(["out", str(tmp_path / "data"), "--check", name]) == 0
    (tmp_path / "data" / "007" / "new.png").write_bytes((tmp_path / "data" / "007" / "00.png").read_bytes())
    assert evaluate(["out", str(tmp_path / "data"), "--check", name]) == 1


def test_seconds_are_of_each_image_where_it_is_scored_by_itself(pandas: Any, tiny: Path, tmp_path: Path) -> None:
    good, data = draw(tmp_path / "good", 5), draw(tmp_path / "data", 4)
    config = ("--config", str(tiny / "config.toml"), "-q")
    assert main(["--reference", str(good), "--save-bank", "part.zsad", *config]) == 0
    run = [str(data), "--bank", "part.zsad", "--format", "parquet", "--resume", "-q"]
    assert main(run) == 0
    seconds = pandas.read_parquet("out/parquet/images").seconds
    assert (len(set(seconds)), seconds.min() > 0) == (4, True)
    (data / "04.png").write_bytes((data / "00.png").read_bytes())
    assert main(run) == 0
    rows = pandas.read_parquet("out/parquet/images").set_index("path")
    assert rows.seconds.isna().sum() == 4  # which the earlier run has scored
    assert rows.seconds["04.png"] > 0
