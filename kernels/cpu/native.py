"""The native module, where zsad was installed with a working compiler."""

try:
    from . import _cpu as _cpu
except ImportError:
    _cpu = None  # type: ignore[assignment]


def has_native_code() -> bool:
    """Tell whether zsad was installed with a working compiler."""
    return _cpu is not None


def vectors_are_wide() -> bool:
    """Tell whether 8-bit products of image towers are known to be fast here: with AVX-512 VNNI or AMX."""
    return _cpu is not None and _cpu.instruction_sets("image_tower")[0].startswith("avx512")
