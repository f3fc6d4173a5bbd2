"""What several test files need."""

import errno
import os
import resource
import shutil
import signal
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from host_build import HostDevice
from host_tensorrt import HostEngine, loaded
from hypothesis import settings
from threadpoolctl import threadpool_limits

from zsad.bench.towers import Shape, write_random_checkpoint
from zsad.engine.networks import runtime as runtimes
from zsad.engine.networks import tensorrt as tensorrt_graphs
from zsad.engine.text.tokenizer import Tokenizer, load_tokenizer
from zsad.export.onnx_export import ExportedModel
from zsad.export.state_dict import CheckpointError
from zsad.export.tensorrt_engine import LoadedEngine
from zsad.export.vision_transformer import DINOV2, DINOV2_REGISTERS
from zsad.kernels.cpu.native import has_native_code
from zsad.kernels.cuda.device import Device, DeviceError, open_device
from zsad.kernels.machine import available_cores

# On a busy machine anything may take long.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Reference arrays and real images live outside the repository; tests that need them are skipped where they are absent.
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure() -> None:
    """Let tests share a machine, and be run in the background."""
    # Workers of pytest-xdist keep all cores busy; threads of BLAS would only wait for one another.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    threadpool_limits(int(os.environ["OPENBLAS_NUM_THREADS"]), "blas")
    # A background job is started with Ctrl-C ignored, and so would be the commands that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let each worker of pytest-xdist begin with what takes long, so that none is left alone with that at the end."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers == 1:
        return
    long = dict[Path, list[pytest.Item]]()
    others = list[pytest.Item]()
    for item in items:
        (long.setdefault(item.path, []) if item.get_closest_marker("long") else others).append(item)
    count, dealt = len(items), list[pytest.Item]()
    for worker in range(workers):  # which of these gets its share of the items, as they stand
        for tests in list(long.values())[worker::workers]:
            dealt += tests
        left = max(0, count * (worker + 1) // workers - len(dealt))
        dealt, others = dealt + others[:left], others[left:]
    items[:] = dealt + others


PASSED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep whether a test has passed."""
    report: Any = yield
    item.stash[PASSED] = report.passed and item.stash.get(PASSED, True)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Function) -> Iterator[None]:
    """Remove the files of a test that has passed, once nothing stands in for what that takes: all write gigabytes."""
    yield
    folder = item.funcargs.get("tmp_path")
    if folder is not None and item.stash.get(PASSED, False):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _one_library() -> Iterator[None]:
    """Nothing waits for a comparison of libraries on its graphs, whose outcome no test should depend on.

    Tests that want OpenVINO or native code ask for it; commands in processes of their own name a runtime.
    """
    real = runtimes.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtimes, "find_spec", lambda name: None if name == "openvino" else real(name))
        patch.setattr(runtimes, "has_native_code", lambda: False)
        yield


@pytest.fixture
def native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native code may run image towers."""
    if not has_native_code():
        pytest.skip("installed without a compiler: the native code is not there")
    monkeypatch.setattr(runtimes, "has_native_code", has_native_code)


@pytest.fixture
def files_up_to() -> Callable[[int], AbstractContextManager[None]]:
    """Stands for disks that are nearly full: in such a context files take what fits into so many bytes, and no more."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))

    return limited


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: some tests wait for processes, clocks and disks."""
    return available_cores() + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let each worker run whole folders, so that most fixtures are made once, and take over what others have left."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of arrays made by the reference implementations."""
    return _shared_folder("golden")


@pytest.fixture(scope="session")
def golden_text(golden: Path) -> Path:
    """The folder of arrays made by the reference implementations of the text-guided methods."""
    if not (golden / "text").is_dir():
        pytest.skip(f"needs {golden / 'text'}, which is not part of the repository")
    return golden / "text"


@pytest.fixture(scope="session")
def golden_segmentation(golden: Path) -> Path:
    """The folder of arrays made by the reference implementations of networks that cut images apart."""
    if not (golden / "segmentation").is_dir():
        pytest.skip(f"needs {golden / 'segmentation'}, which is not part of the repository")
    return golden / "segmentation"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """CLIP's, with its real vocabulary, which is fetched once."""
    try:
        return load_tokenizer()
    except CheckpointError as error:
        pytest.skip(f"CLIP's vocabulary cannot be had here: {error}")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images in MVTec layout."""
    return _shared_folder("data")


def _shared_folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"needs {folder}, which is not part of the repository")
    return folder


@pytest.fixture(scope="session")
def random_dinov2(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a random DINOv2 in its official names, stored for 70 px, and returns its file."""

    def write(width: int = 64, depth: int = 2, gated: bool = False, registers: int = 0) -> Path:
        path = tmp_path_factory.mktemp("dinov2") / f"dinov2-{width}-{depth}.safetensors"
        shape = Shape(
            DINOV2_REGISTERS if registers else DINOV2, width, depth, stored_grid=5, gated=gated, registers=registers
        )
        write_random_checkpoint(shape, path, deviation=0.05)
        return path

    return write


@pytest.fixture(scope="session")
def tiny(random_dinov2: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of its own and `config.toml`, which points the preset `small` at a random DINOv2.

    48 channels, 4 blocks, 70 px (25 patches): a whole run takes a fraction of a second.
    """
    folder = tmp_path_factory.mktemp("tiny")
    checkpoint = random_dinov2(width=48, depth=4)
    (folder / "config.toml").write_text(
        f'image_size = 70\n[networks.dinov2]\ncheckpoint = "{checkpoint}"\nheads = 3\ntaps = [1, 3]\n'
    )
    (folder / "cache").mkdir()
    return folder


@pytest.fixture
def two_networks(random_dinov2: Callable[..., Path], tmp_path: Path) -> Path:
    """The challenge's preset with two tiny random networks that want their images in different ways."""
    path = tmp_path / "challenge.toml"
    path.write_text(
        f"""
        image_size = 70
        [networks.dinov2]
        checkpoint = "{random_dinov2(width=48, depth=2)}"
        heads = 3
        taps = [0, 1]
        [networks.clip]
        checkpoint = "{random_dinov2()}"
        preprocessing = "clip"
        taps = [0, 1]
        """
    )
    return path


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has no weights and no graphs at all."""
    monkeypatch.setenv("ZSAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ZSAD_WEIGHTS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a folder one in which nothing can be made, also for root."""

    def protect(folder: Path) -> None:
        real = tempfile.TemporaryFile

        def refuse(**options: Any) -> Any:
            if Path(options.get("dir", "/")).is_relative_to(folder):
                raise OSError(errno.EROFS, "Read-only file system")
            return real(**options)

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)

    return protect


@pytest.fixture(scope="session")
def gpu() -> Device:
    """The first CUDA device; tests that use it carry the marker `gpu`."""
    try:
        return open_device("cuda")
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> HostDevice:
    """A machine with a CUDA device, and with TensorRT instead of the other runtimes."""
    device = HostDevice()
    monkeypatch.setattr("zsad.kernels.cuda.device.open_devices", lambda name: [device])
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == "openvino" else object())
    monkeypatch.setattr(runtimes, "import_tensorrt", lambda target: types.SimpleNamespace(__version__="10.14.1"))
    return device


@pytest.fixture
def tensorrt(emulated_gpu: HostDevice, monkeypatch: pytest.MonkeyPatch) -> list[HostEngine]:
    """Engines are built in no time and run on the host; returns those that were loaded."""
    engines: list[HostEngine] = []

    def build(graph: ExportedModel, *_: object) -> Any:
        return types.SimpleNamespace(path=graph.path, fingerprint=types.SimpleNamespace(agreement="compared before"))

    def load(path: Path, number: int, onnx: Path) -> LoadedEngine:
        assert onnx == path
        engines.append(HostEngine(onnx, 32))
        return loaded(engines[-1])

    monkeypatch.setattr("zsad.export.tensorrt_engine.build_engine", build)
    monkeypatch.setattr(tensorrt_graphs, "load_engine", load)
    return engines


@pytest.fixture
def workplace(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the test's own to run commands in, with the tiny network's cache and no other weights."""
    monkeypatch.setenv("ZSAD_CACHE", str(tiny / "cache"))
    monkeypatch.delenv("ZSAD_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)
