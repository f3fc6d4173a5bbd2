"""The benchmark of starting: what its rounds say."""

from pathlib import Path

import pytest

from zsad.bench import startup


def test_what_a_process_takes_beyond_the_networks_is_a_median_of_rounds() -> None:
    runs = {"here": [(2.0, 3.0), (2.2, 3.2), (4.0, 3.4)], "old": [(4.0, 5.0), (6.6, 5.0), (6.0, 5.0)]}
    record = {"images": 2, "networks_s": [1.0, 1.1, 1.2], "runs_s": runs}
    lines = list(startup.said(record))
    assert lines[0] == "networks, 2 images: 1.10 s"
    assert lines[1] == "here: 2.20 s from start to end, 1.10 s beyond the networks, 3.20 s of processors"
    assert lines[3] == "here 2.00 times as fast as old"


def test_the_first_round_is_not_counted() -> None:
    laps = iter([(9.0, 9.0), (2.0, 1.0), (3.0, 1.0)])
    found = startup.measured({"here": lambda: next(laps)}, lambda: 1.0, 2)
    assert found == {"networks_s": [1.0, 1.0], "runs_s": {"here": [(2.0, 1.0), (3.0, 1.0)]}}


@pytest.mark.slow
def test_a_process_that_fails_is_not_timed(tmp_path: Path) -> None:
    run = startup.process(None, tmp_path, tmp_path / "out", "fp32")  # an empty folder
    with pytest.raises(startup.subprocess.CalledProcessError):
        run()
