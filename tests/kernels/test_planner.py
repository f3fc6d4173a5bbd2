"""Plans fit their limit, prefer speed, and refuse what cannot run."""

import pytest

from zsad.kernels.planner import available_cores, default_memory_limit, plan_mutual_scoring

GIB = 2**30


@pytest.mark.parametrize("images", [2, 3, 50, 200, 2000, 20000])
@pytest.mark.parametrize("limit", [1 * GIB, 4 * GIB, 24 * GIB])
def test_plan_fits_the_limit(images: int, limit: int) -> None:
    plan = plan_mutual_scoring(images, 1369, 1024, 3, limit)
    assert plan.peak_bytes <= limit
    assert 1 <= plan.block <= images
    assert plan.workers >= 1
    assert plan.describe()


def test_everything_stays_in_memory_when_it_fits() -> None:
    plan = plan_mutual_scoring(100, 1369, 384, 2, 16 * GIB)
    assert plan.block == 100
    assert plan.minima_in_memory
    assert plan.workers == available_cores()


def test_a_tighter_limit_spills_the_minima_first() -> None:
    plan = plan_mutual_scoring(200, 1369, 384, 2, 600 * 2**20)
    assert plan.block == 200
    assert not plan.minima_in_memory


def test_a_limit_below_the_minimum_names_what_is_needed() -> None:
    with pytest.raises(MemoryError, match=r"at least .* MiB.*--memory-limit"):
        plan_mutual_scoring(100, 1369, 1024, 3, 10 * 2**20)


def test_default_limit_is_less_than_the_machine_has() -> None:
    assert 0 < default_memory_limit() < 2**50
