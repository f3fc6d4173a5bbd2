"""Offers the real device, where there is one."""

from __future__ import annotations

import pytest

from zsad.kernels import cuda


@pytest.fixture(scope="session")
def gpu() -> cuda.Device:
    """The first CUDA device; tests that use it carry the marker `gpu`."""
    try:
        return cuda.open_device("cuda")
    except cuda.DeviceError as error:
        pytest.skip(str(error))
