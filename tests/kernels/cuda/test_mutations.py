"""Bugs planted in the CUDA sources must be found by the kernel checks."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import host_build
import pytest
from mutations import CHECKS, DEFINES, MUTATIONS, check, found, planted

EVERY = int(os.environ.get("ZSAD_BUGS", "4"))  # 1: all, which takes minutes

pytestmark = pytest.mark.skipif(host_build.COMPILER is None, reason=host_build.MISSING_COMPILER)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "defines"),
    [
        *((source, DEFINES.get(source, ())) for source in CHECKS),
        *((source, host_build.WARPGROUPS) for source in ("fused", "tiled")),
    ],
)
def test_sources_without_planted_bugs_pass(source: str, defines: tuple[str, ...]) -> None:
    check(source, host_build.library(source, defines))


@pytest.mark.long
def test_at_least_nine_of_ten_planted_bugs_are_found() -> None:
    host_build.standard_headers()
    tried = MUTATIONS[::EVERY]
    with ThreadPoolExecutor(2) as pool:
        unnoticed = [mutation.bug for mutation, said in zip(tried, pool.map(found, tried), strict=True) if said is None]
    assert len(unnoticed) * 10 <= len(tried), unnoticed


def test_a_mutation_that_no_longer_fits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="no longer occurs"):
        planted(replace(MUTATIONS[0], old="no such text"), tmp_path)
