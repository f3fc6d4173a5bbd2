"""The two things the export side asks of a GPU, straight from the driver: what it is, and to make it current."""

import ctypes
from typing import Any

DRIVER = "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


class CudaError(Exception):
    """There is no usable GPU; the message says why."""


def use_device(device: int) -> str:
    """Make a GPU current for this thread, for CUDA's runtime too, and return its compute capability, as in `8.9`.

    Raises CudaError when there is no driver or no such device.
    """
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        raise CudaError(f"no NVIDIA driver on this machine ({DRIVER} is missing)") from None
    count, handle, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    _call(driver.cuInit(0), "cuInit")
    _call(driver.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    if not 0 <= device < count.value:
        raise CudaError(f"there is no GPU {device}; this machine has {count.value}, numbered from 0")
    _call(driver.cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    capability = []
    for attribute in (MAJOR, MINOR):
        value = ctypes.c_int()
        _call(driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle), "cuDeviceGetAttribute")
        capability.append(str(value.value))
    # The primary context is the one that CUDA's runtime, and so TensorRT, uses.
    _call(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
    _call(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    return ".".join(capability)


def _call(status: Any, name: str) -> None:
    if status:
        raise CudaError(f"the NVIDIA driver does not work: {name} returned {status} (see nvidia-smi)")
