"""What the tests of several methods have in common."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

SCENES = 13


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the runs of all these tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def vvv_host(golden: Path) -> Mapping[str, NDArray[Any]]:
    """What Variance Vigilance Vanguard's steps between the networks make of given inputs."""
    path = golden / "segmentation" / "vvv_host.npz"
    if not path.is_file():
        pytest.skip(f"needs {path}, which is not part of the repository")
    arrays = np.load(path)
    return {name: arrays[name] for name in arrays.files}


@pytest.fixture(params=range(SCENES))
def scene(request: pytest.FixtureRequest, vvv_host: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """One made-up image: its arrays by name, masks unpacked."""
    prefix = f"scene{request.param:02d}_"
    arrays = {name.removeprefix(prefix): array for name, array in vvv_host.items() if name.startswith(prefix)}
    height, width = arrays["size"]
    for name in ("f_dis", "masks", "foreground"):
        bits = np.unpackbits(arrays.pop(f"{name}_packed"), axis=-1, count=height * width)
        arrays[name] = bits.reshape(*bits.shape[:-1], height, width).view(bool)
    return {**arrays, "rule": vvv_host["scene_rules"][request.param]}
