"""A run on a real Ray of two workers gives what a run in one process gives, whatever is killed on the way."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import draw

from zsad.engine.commands.infer import main

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'zsad[ray]'"),
    pytest.mark.usefixtures("workplace"),
]

SECONDS = 300  # after which a run hangs
OF_TIME = ("started", "seconds", "images_per_second", "peak_memory_bytes", "stages", "library_share")
DEADLY = "deadly.png"  # kills whoever reads it
TRIES = 2  # with such an image


def deadly() -> None:
    """Make a worker die, as of a fault in a decoder, when it reads a certain file, and be given up soon."""
    from zsad.engine.cluster import worker
    from zsad.engine.images import loader

    worker.TRIES = TRIES
    decode = loader.decode

    def dying(path: Path, *options: Any) -> Any:
        if path.name == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(path, *options)

    loader.decode = dying


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray of two processors on this machine; yields its address."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have no tests to import
    os.environ["RAY_AUTH_MODE"] = "disabled"  # else only this process may use it
    context = ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 << 20,
        runtime_env={"worker_process_setup_hook": deadly},
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()
    del os.environ["RAY_AUTH_MODE"]


@pytest.fixture
def options(tiny: Path) -> list[str]:
    """Of `zsad-infer` over `data`, whose `plate` is scored in groups."""
    return [
        "data",
        "--config",
        str(tiny / "config.toml"),
        "--image-size",
        "140",
        "--group-size",
        "8",
        "--device",
        "cpu",
        "--runtime",
        "onnxruntime",
    ]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    for name, count in (("bolt", 8), ("nut", 8), ("plate", 88)):
        draw(folder / "data" / name, count)
    (folder / "data/nut/03.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    cut = folder / "data/plate/07.png"
    cut.write_bytes(cut.read_bytes()[:900])
    return folder


@pytest.fixture
def data(drawn: Path, workplace: None, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some images are damaged; `one` has what one process gives for them."""
    monkeypatch.chdir(drawn)
    if not Path("one").exists():
        assert main([*options, "-q", "--output", "one"]) == 1


def results(output: str) -> dict[str, Any]:
    """Return digests of all files in an output folder, and the run's record without what time decides."""
    files = [
        path for path in Path(output).rglob("*") if path.is_file() and path.name not in ("report.html", "run.json")
    ]
    digests = {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    run = json.loads((Path(output) / "run.json").read_text())
    for category in run["categories"].values():
        del category["seconds"], category["resumed"]
    assert (Path(output) / "report.html").is_file()
    return {**digests, "run.json": {name: value for name, value in run.items() if name not in OF_TIME}}


def ended_groups(output: str) -> int:
    return sum(len(path.read_bytes().splitlines()) - 1 for path in Path(output).glob(".*.groups/groups.jsonl"))


def workers(of: psutil.Process) -> list[psutil.Process]:
    found = of.children(recursive=True)
    return [process for process in found if any(part.startswith("ray::Worker") for part in process.cmdline()[:1])]


@pytest.mark.usefixtures("cluster")
def test_an_image_that_kills_whoever_reads_it_costs_only_its_category(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("bolt", "nut"):
        draw(Path("data") / name, 7)
    assert main([*options, "-q", "--output", "one"]) == 0
    shutil.copy("data/nut/03.png", f"data/nut/{DEADLY}")
    assert main([*options, "-q", "--output", "two", "--ray", "--workers", "1"]) == 1
    said = capsys.readouterr().err
    assert f"zsad-infer: nut: its worker died {TRIES} times" in said
    assert "8 images without a score" in said
    one, two = results("one"), results("two")
    assert {name for name in two if name.startswith("nut")} == set()
    bolt = [name for name in one if name.startswith("bolt")]
    assert [one[name] for name in bolt] == [two[name] for name in bolt]
    assert not [name for name in two if name.startswith(".")]


def command(options: list[str], *more: str) -> list[str]:
    """A run in a process of its own."""
    code = "import sys; from zsad.engine.commands.infer import main; sys.exit(main())"
    return [sys.executable, "-c", code, *options, *more]


def wait_for_groups(output: str, count: int, run: subprocess.Popen[Any]) -> None:
    begin = time.monotonic()
    while ended_groups(output) < count:
        assert time.monotonic() < begin + SECONDS, "the run hangs"
        assert run.poll() is None, "the run has ended before it was disturbed"
        time.sleep(0.01)


def test_killed_commands_and_workers_and_damaged_images_change_no_byte(
    options: list[str], data: None, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--output", "two", "--workers", "1", "--resume", "--ray"]
    with subprocess.Popen(
        command(options, *more, cluster), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as run:
        wait_for_groups("two", 3, run)
        run.kill()
    before, killed = ended_groups("two"), list[int]()

    def kill() -> None:
        while ended_groups("two") < before + 2:
            time.sleep(0.01)
        killed.append(workers(psutil.Process())[0].pid)
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert main([*options, *more]) == 1
    killer.join(1)
    assert killed
    assert "groups have ended in an earlier run" in capsys.readouterr().err
    assert results("two") == results("one")


@dataclass
class Machines:
    """Two Ray nodes of one processor each, in network namespaces, of which the second sees another `hidden/`."""

    inside: list[str]  # what runs a command in the first one's
    address: str
    nodes: list[subprocess.Popen[Any]]

    def end(self, number: int) -> None:
        """End a node as a power cut does."""
        node = psutil.Process(self.nodes[number].pid)
        for process in [*node.children(recursive=True), node]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.nodes[number].wait(SECONDS)


@pytest.fixture
def machines(workplace: None) -> Iterator[Machines]:
    ip = shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if ip is None or os.geteuid() != 0:
        pytest.skip("needs network namespaces: run as root, with iproute2 installed")
    names = [f"zsad{os.getpid()}{end}" for end in "ab"]
    ends, addresses = ["zsad-a", "zsad-b"], ["10.77.0.1", "10.77.0.2"]

    def set_up(*words: str) -> bool:
        return subprocess.run([ip, *words], check=False, capture_output=True).returncode == 0

    Path("hidden").mkdir()
    nodes: list[subprocess.Popen[Any]] = []
    try:
        if not all(set_up("netns", "add", name) for name in names):
            pytest.skip("network namespaces cannot be made here")
        assert set_up(
            "-n", names[0], "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", names[1]
        )
        for name, device, address in zip(names, ends, addresses, strict=True):
            assert set_up("-n", name, "addr", "add", f"{address}/24", "dev", device)
            assert all(set_up("-n", name, "link", "set", up, "up") for up in (device, "lo"))
        start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
        start += ["--object-store-memory=100000000", "--disable-usage-stats"]
        head = [*start, "--head", "--port=6379", f"--node-ip-address={addresses[0]}", "--include-dashboard=false"]
        other = [*start, f"--address={addresses[0]}:6379", f"--node-ip-address={addresses[1]}"]
        mounted = [
            "unshare",
            "-m",
            "sh",
            "-c",
            f"mount -t tmpfs none {Path('hidden').absolute()}; exec {shlex.join(other)}",
        ]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        for name, node in zip(names, (head, mounted), strict=True):
            with Path(f"{name}.log").open("w") as log:
                nodes.append(
                    subprocess.Popen([ip, "netns", "exec", name, *node], stdout=log, stderr=log, env=environment)
                )
            wait_for_text(Path(f"{name}.log"), "Ray runtime started")
        yield Machines([ip, "netns", "exec", names[0]], f"{addresses[0]}:6379", nodes)
    finally:
        for number in range(len(nodes)):
            with suppress(psutil.NoSuchProcess):
                Machines([], "", nodes).end(number)
        for name in names:
            set_up("netns", "del", name)


def wait_for_text(file: Path, text: str) -> None:
    begin = time.monotonic()
    while text not in file.read_text():
        assert time.monotonic() < begin + SECONDS, file.read_text()
        time.sleep(0.1)


def test_machines_apart_give_the_same_and_one_may_leave(data: None, machines: Machines, options: list[str]) -> None:
    ray_run = [*machines.inside, *command(options, "--workers", "1", "--ray", machines.address, "--output")]
    # What one of them cannot see is sent.
    ended = subprocess.run([*ray_run, "hidden/two"], capture_output=True, text=True, check=False, timeout=SECONDS)
    assert ended.returncode == 1, ended.stderr
    assert results("hidden/two") == results("one")
    with subprocess.Popen([*ray_run, "three"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        wait_for_groups("three", 4, run)
        machines.end(1)
        _, said = run.communicate(timeout=SECONDS)
    assert run.returncode == 1, said
    assert results("three") == results("one")
