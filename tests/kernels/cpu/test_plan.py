"""Plans fit their limit, prefer speed, and refuse what cannot run."""

import pytest

from zsad.kernels.cpu.plan import Plan, Sizes, compared_pairs, plan_mutual_scoring
from zsad.kernels.machine import available_cores, default_memory_limit

GIB = 2**30


@pytest.mark.parametrize("images", [2, 3, 50, 200, 2000, 20000])
@pytest.mark.parametrize("limit", [1 * GIB, 4 * GIB, 24 * GIB])
@pytest.mark.parametrize("disk", [0, 100 * GIB, 10_000 * GIB])
@pytest.mark.parametrize("int8", [False, True])
def test_plan_fits_the_limit(images: int, limit: int, disk: int, int8: bool) -> None:
    def plan(limit: int) -> Plan:
        ranks = max(1, int(0.3 * (images - 1))) if int8 else 0
        return plan_mutual_scoring(Sizes(images, 1369, 1024, 3, remeasured_ranks=ranks), limit, disk)

    if int8 and images == 20000 and limit == GIB:
        limit *= 2  # the winners of two images on each side, their minima and a worker take more than 1 GiB
    planned, more = plan(limit), plan(2 * limit)
    assert planned.peak_bytes <= limit
    assert 1 <= planned.chunk <= images
    assert 1 <= planned.rows <= images
    assert planned.workers >= 1
    assert planned.describe()
    assert more.comparisons() <= planned.comparisons()
    assert more.workers >= planned.workers
    if planned.minima_in_memory:
        assert planned.minima_bytes <= limit
    else:
        assert planned.minima_bytes <= disk
        assert planned.rows == images


def test_no_images_need_next_to_nothing() -> None:
    assert plan_mutual_scoring(Sizes(0, 1369, 1024, 3), GIB).peak_bytes < GIB  # a folder without readable images


def test_rows_times_pairs() -> None:
    assert compared_pairs(10, 10) == 45
    assert compared_pairs(10, 4) == (6 + 4 * 6) * 2 + 1 + 2 * 8
    assert compared_pairs(10, 1) == 90


def test_everything_stays_in_memory_when_it_fits() -> None:
    plan = plan_mutual_scoring(Sizes(100, 1369, 384, 2), 16 * GIB)
    assert plan.chunk == 100
    assert plan.minima_in_memory
    assert plan.workers == available_cores()


def test_a_tighter_limit_spills_the_minima_first() -> None:
    plan = plan_mutual_scoring(Sizes(200, 1369, 384, 2), 600 * 2**20)
    assert plan.chunk == 200
    assert not plan.minima_in_memory


def test_a_limit_below_the_minimum_names_what_is_needed() -> None:
    with pytest.raises(MemoryError, match=r"at least .* MiB.*--memory-limit"):
        plan_mutual_scoring(Sizes(100, 1369, 1024, 3), 10 * 2**20)


def test_default_limit_is_less_than_the_machine_has() -> None:
    assert 0 < default_memory_limit() < 2**50
