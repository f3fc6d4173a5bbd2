"""Makes the helpers of this folder importable and offers the real device, where there is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from zsad.kernels import cuda


@pytest.fixture(scope="session")
def gpu() -> cuda.Device:
    """The first CUDA device; tests that use it carry the marker `gpu`."""
    try:
        return cuda.open_device("cuda")
    except cuda.DeviceError as error:
        pytest.skip(str(error))
