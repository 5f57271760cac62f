"""The GPU of this machine, asked of the CUDA driver (no package needed)."""

from __future__ import annotations

import ctypes
import functools
import os

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@functools.cache
def local_gpu() -> str | None:
    """The compute capability of the first CUDA device as `sm89`; None without a device or a working driver."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
            return None
        return f"sm{_attribute(driver, _MAJOR)}{_attribute(driver, _MINOR)}"
    except (OSError, AttributeError):
        return None


def _attribute(driver: ctypes.CDLL, which: int) -> int:
    value = ctypes.c_int(0)
    driver.cuDeviceGetAttribute(ctypes.byref(value), which, 0)
    return value.value
