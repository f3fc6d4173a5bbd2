"""What the machine is said to have: cores within a container's quota, memory, a cache that may be written or not."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from zsad.kernels import machine
from zsad.kernels.machine import (
    CacheError,
    available_cores,
    cache_folder,
    cache_places,
    cache_to_write,
    default_disk_limit,
    default_memory_limit,
    peak_memory,
    scratch,
    stopwatch,
)


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a container sees its limits, on a machine with 16 processors."""
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000\n", 16),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("5000 100000\n", 1),
        ("9900000 100000\n", 16),
        ("what no kernel writes", 16),
    ],
)
def test_the_quota_of_a_container_counts(container: Path, text: str, cores: int) -> None:
    (container / "cpu.max").write_text(text)
    assert available_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 16), ("400000", 4), ("50000", 1)])
def test_the_quota_of_version_1_counts(container: Path, quota: str, cores: int) -> None:
    (container / "cpu").mkdir()
    (container / "cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
    (container / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert available_cores() == cores


def test_without_a_container_all_cores_count(container: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_cores() == 16
    monkeypatch.delattr(machine.os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 3)
    assert available_cores() == 3


def test_the_memory_of_a_container_counts(container: Path) -> None:
    plenty = default_memory_limit()
    assert 0 < plenty < 2**50
    (container / "memory.max").write_text("max\n")
    (container / "memory.current").write_text("1000\n")
    assert default_memory_limit() > plenty // 2
    (container / "memory.max").write_text("5000\n")
    assert default_memory_limit() == 3000


@pytest.mark.slow
def test_a_limit_of_the_address_space_counts() -> None:
    code = "from zsad.kernels.machine import default_memory_limit as limit; print(limit())"
    plenty = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    limited = f"ulimit -v 2000000 && exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    found = int(subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=True).stdout)
    assert 0 < found < min(plenty, 0.75 * 2_000_000 * 1024)


def test_one_folder_for_what_can_be_fetched_or_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    for unset in ("", None):
        monkeypatch.setenv("ZSAD_CACHE", unset) if unset is not None else monkeypatch.delenv("ZSAD_CACHE")
        assert cache_folder().name == "zsad"


@pytest.mark.parametrize("in_memory", [True, False])
def test_scratch_holds_what_is_written(in_memory: bool) -> None:
    with scratch((3, 5), in_memory, np.int16) as array:
        assert array.shape == (3, 5)
        assert isinstance(array, np.memmap) != in_memory
        array[:] = 7
        assert (array == np.int16(7)).all()


def test_scratch_on_a_full_disk_fails_before_anything_is_written() -> None:
    if not hasattr(machine.os, "posix_fallocate"):
        pytest.skip("this system allocates no space ahead")
    with pytest.raises(OSError, match=r"."), scratch((1 << 60,), False, np.uint8):
        pass


def test_limits_are_less_than_the_machine_has() -> None:
    assert 0 < default_disk_limit() < 2**60
    before = peak_memory()
    np.ones(50 << 17)  # 50 MiB
    assert 2**20 < before <= peak_memory() < 2**50


def test_the_stopwatch_adds_up_also_where_the_block_fails() -> None:
    timings = {"work": 1.0}
    with suppress(KeyError), stopwatch(timings, "work"):
        time.sleep(0.01)
        raise KeyError
    assert 1.01 <= timings["work"] < 2


def test_the_cache_is_where_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "a" / "cache"))
    assert cache_places("models") == []
    assert cache_to_write("models") == cache_to_write("models", keep=True) == tmp_path / "a" / "cache" / "models"
    assert cache_places("models") == [tmp_path / "a" / "cache" / "models"]
    assert not list(cache_to_write("models").iterdir())


def test_a_temporary_folder_stands_in_for_a_cache_that_may_only_be_read(
    tmp_path: Path, read_only: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path))
    (tmp_path / "models").mkdir()
    read_only(tmp_path)
    with pytest.raises(CacheError, match=r"cannot be written \(Read-only file system\); .* export ZSAD_CACHE="):
        cache_to_write("weights", keep=True)
    places = [cache_to_write(kind) for kind in ("models", "models", "engines")]
    assert {place.parent for place in places} == {places[0].parent}
    assert not places[0].is_relative_to(tmp_path)
    assert cache_places("models") == [tmp_path / "models", places[0]]
    [record] = caplog.records  # once
    assert record.levelname == "WARNING"
    assert "set ZSAD_CACHE to a folder that can be" in record.getMessage()


@pytest.mark.slow
def test_what_stands_in_goes_with_the_process(tmp_path: Path) -> None:
    code = (
        "import errno, os, tempfile; from zsad.kernels import machine\n"
        "def refuse(**_): raise OSError(errno.EACCES, 'Permission denied')\n"
        "tempfile.TemporaryFile = refuse; folder = machine.cache_to_write('models')\n"
        "(folder / 'graph').touch(); print(folder, (folder / 'graph').exists())"
    )
    environment = {**os.environ, "ZSAD_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == f"{next(iter(ran.stdout.split()))} True\n"
    assert ran.stdout.startswith(str(tmp_path / "zsad-cache-"))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_cache_that_is_a_file_is_an_error(tmp_path: Path, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "cache" / below))
    assert cache_places("models") == []
    with pytest.raises(CacheError, match=f"{tmp_path / 'cache'} is a file.; set ZSAD_CACHE"):
        cache_to_write("models")


def test_without_a_home_nothing_is_written_into_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZSAD_CACHE", raising=False)
    monkeypatch.setattr(machine.platformdirs, "user_cache_path", lambda name: Path("~/.cache") / name)
    with pytest.raises(CacheError, match="there is no home folder"):
        cache_to_write("weights", keep=True)
    assert cache_to_write("models").is_dir()
    assert not list(tmp_path.iterdir())
