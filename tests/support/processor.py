"""What the processor of the tests lacks."""

from pathlib import Path

import pytest


def _flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


# With AVX2 alone ONNX Runtime adds pairs of int8 products in 16 bits, where large ones saturate: tokens fall below the
# cosines that hold elsewhere, and an export then keeps more layers in fp32.
needs_vnni = pytest.mark.skipif("vnni" not in _flags(), reason="int8 products saturate on a processor without VNNI")
