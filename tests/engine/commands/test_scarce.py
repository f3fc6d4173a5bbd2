"""What becomes of commands for which there is too little memory."""

import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from runs import draw

LINE = "zsad-x: too little memory: ulimit -v allows 256 MB; allow more: ulimit -v unlimited\n"


def supervise(run: str) -> tuple[int, str, str]:
    """Run Python code under supervision; returns the exit code and what it prints."""
    code = (
        "import ctypes, os, signal, sys, threading, time\n"
        "from zsad.engine.commands.scarce import supervised\n"
        f"def run():\n    os.write(2, b'a library speaks\\n')\n    {run}\n"
        "sys.exit(supervised('zsad-x', 256 << 20, run))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout, ended.stderr


@pytest.mark.parametrize(
    "crash",
    [
        "os.kill(os.getpid(), signal.SIGSEGV)",
        pytest.param("os.abort()", marks=pytest.mark.slow),
        pytest.param("os._exit(127)", marks=pytest.mark.slow),
        pytest.param("raise MemoryError", marks=pytest.mark.slow),
        "raise ImportError('x.so: failed to map segment from shared object')",
        pytest.param("raise RuntimeError from MemoryError()", marks=pytest.mark.slow),
    ],
)
def test_whatever_a_want_of_memory_ends_in_is_one_line(crash: str) -> None:
    assert supervise(crash) == (2, "", LINE)


@pytest.mark.parametrize(
    ("run", "ended"),
    [
        ("print('out'); print('error', file=sys.stderr); return 1", (1, "out\n", "error\na library speaks\n")),
        pytest.param("sys.exit(3)", (3, "", "a library speaks\n"), marks=pytest.mark.slow),
        pytest.param("return 0", (0, "", "a library speaks\n"), marks=pytest.mark.slow),
    ],
)
def test_what_ends_by_itself_is_as_without_supervision(run: str, ended: tuple[int, str, str]) -> None:
    assert supervise(run) == ended


@pytest.mark.slow
def test_a_fault_of_ours_has_its_traceback() -> None:
    code, _, error = supervise("raise ValueError('ours')")
    assert code == 1
    assert "ValueError: ours" in error


SLEEPS = (
    "import sys, time; from zsad.engine.commands.scarce import supervised\n"
    "def run():\n    print('begun', flush=True)\n    time.sleep(60)\n"
    "sys.exit(supervised('zsad-x', 1, run))"
)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_with_its_parent(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        (child,) = psutil.Process(parent.pid).children()
        parent.send_signal(number)
        parent.wait(30)
        assert psutil.wait_procs([child], 30)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("megabytes", [200, 300, 400, 500, 600, 700, 800, 4000])
@pytest.mark.usefixtures("workplace")
def test_a_run_in_little_memory_ends_in_results_or_a_word(megabytes: int, tiny: Path, tmp_path: Path) -> None:
    draw(tmp_path / "data", 3)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    ended = subprocess.run(
        [
            Path(sys.executable).with_name("zsad-infer"),
            "data",
            "--config",
            str(tiny / "config.toml"),
            "--device",
            "cpu",
            "-q",
        ],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    if ended.returncode == 2:
        assert ended.stderr.startswith("zsad-infer: too little memory")
        assert ended.stderr.count("\n") == 1
    else:
        assert (ended.returncode, ended.stderr) == (0, "")
    assert megabytes < 4000 or ended.returncode == 0
