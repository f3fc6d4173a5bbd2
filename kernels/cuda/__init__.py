"""Mutual scoring, and the images that go into it, on CUDA devices."""

from .comparers import MAX_THREADS, OWN_PATCHES, Products, choose_comparer, filter_max_shape
from .device import Device, DeviceError, DeviceMemoryError, filter_max_kernel, open_device, open_devices
from .images import network_input
from .plan import CudaPlan, plan_mutual_scoring

__all__ = [
    "MAX_THREADS",
    "OWN_PATCHES",
    "CudaPlan",
    "Device",
    "DeviceError",
    "DeviceMemoryError",
    "Products",
    "choose_comparer",
    "filter_max_kernel",
    "filter_max_shape",
    "network_input",
    "open_device",
    "open_devices",
    "plan_mutual_scoring",
]
