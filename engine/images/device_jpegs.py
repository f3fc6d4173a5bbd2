"""JPEG files decoded on the GPU by nvImageCodec, an option for hosts whose cores are fewer than the GPU is fast."""

import threading
from typing import Any

from zsad.engine.config import ConfigError
from zsad.export.libraries import gpu_extras, install_command
from zsad.kernels.cuda.device import Device

from .remote import Location
from .stored import opened

Array = Any  # on the device


class DeviceJpegs:
    """One decoder per thread; what nvImageCodec does not decode is left to Pillow, which can say what is wrong."""

    def __init__(self, device: Device) -> None:
        """Raises ConfigError with the line that installs the library."""
        try:
            from nvidia import nvimgcodec
        except ImportError as error:
            raise ConfigError(
                f"--decoder nvimgcodec: nvImageCodec is not installed ({error}); run: "
                f"{install_command(gpu_extras('gpu', 'nvimgcodec'))}"
            ) from None
        self._library, self._device = nvimgcodec, device
        self._how = nvimgcodec.DecodeParams(apply_exif_orientation=True, color_spec=nvimgcodec.ColorSpec.SRGB)
        self._threads = threading.local()

    def decode(self, path: Location) -> Array | None:
        """Return a whole colour JPEG's pixels [rows, columns, 3] uint8, upright; None for every other file.

        Raises ImageError where even the header cannot be read.
        """
        with opened(path) as image:
            if image.format != "JPEG" or image.mode != "RGB":
                return None
        content = path.read_bytes()
        if not content.rstrip(b"\0").endswith(b"\xff\xd9"):  # cut off, which the GPU decodes without a word
            return None
        if not hasattr(self._threads, "decoder"):
            self._device.use()
            # Subsampled colours are interpolated, as Pillow's decoder does.
            self._threads.decoder = self._library.Decoder(
                device_id=self._device.number, max_num_cpu_threads=1, options=":fancy_upsampling=1"
            )
        decoded = self._threads.decoder.decode(content, params=self._how)
        return None if decoded is None else self._device.adopt(decoded)
