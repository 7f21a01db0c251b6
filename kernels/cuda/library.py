"""The compiled CUDA quantisers, loaded on a device: functions that ``quartet.kernels.launcher`` launches."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from quartet.kernels.build_cache import BuildError
from quartet.kernels.cuda.build import library
from quartet.kernels.launcher import DRIVER, Function, driver

SHARED = 227 * 1024  # bytes that a thread block can have
_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CHAIN = ("*", "*", "u32")  # signs, seed, site
_PARAMETERS = {  # as in quantizers.cu
    "quantize_both": ("*", *_CHAIN, *_CHAIN, "*", "*", "*", "*", "*", "i64", "i32", "i32", "i32"),
    "requantize": ("*", "*", *_CHAIN, "*", "*", "*", "*", "*", "i32", "i32", "i32"),
}


@cache
def function(device: int, name: str, cluster: int, threads: int, shared: int) -> Function:
    """A quantiser of ``quantizers.cu`` on a CUDA device, for clusters of so many thread blocks, which each have so many
    threads and bytes of shared memory; built if need be. Raises BuildError, also where the driver declines it."""
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        _check(driver(DRIVER).cuModuleGetFunction(ctypes.byref(handle), _module(device), f"{name}_{cluster}".encode()),
               f"find {name}_{cluster}")
        _check(driver(DRIVER).cuFuncSetAttribute(handle, _SHARED_MEMORY, SHARED), f"give {name} {SHARED} bytes")
    assert handle.value is not None
    return Function(name, handle.value, threads, shared, _PARAMETERS[name])


@cache
def _module(device: int) -> ctypes.c_void_p:
    path, module = library(), ctypes.c_void_p()
    torch.cuda.synchronize(device)  # makes the device's context
    _check(driver(DRIVER).cuModuleLoadData(ctypes.byref(module), path.read_bytes()), f"load {path}")
    return module


def _check(status: int, what: str) -> None:
    if status:
        raise BuildError(f"the CUDA driver does not {what}: CUresult {status}; run `quartet cache clear`, or name "
                         "'cuda_quantize_both.cuda' and 'cuda_requantize.cuda' in disable_kernels")
