"""Kernels for the CPU, in C++ under ``cpp/``, built into the extension ``_native`` (CMakeLists.txt).

The extension picks its instruction set when it runs, from the processor's own account. Where it was not built
or cannot be loaded, ``native`` is None, ``native_problem()`` says why, and callers use torch.
"""

import ctypes
from types import ModuleType

native: ModuleType | None
try:
    from fourfold.kernels.cpu import _native as native
except ImportError as error:
    native, _problem = None, str(error)
else:
    _problem = None


def native_available() -> bool:
    """Whether the C++ kernels can be used."""
    return native is not None


def native_problem() -> str | None:
    """Why the C++ kernels cannot be used, or None when they can."""
    return _problem


def cpu_features() -> dict[str, bool]:
    """Instruction sets that have a kernel, slowest first, and whether each can be used here."""
    return {} if native is None else native.cpu_features()


def threads() -> int:
    """Threads that the C++ kernels use, the caller's included; 1 without the extension."""
    return 1 if native is None else native.threads()


def share_openmp_threads(share: bool = True) -> bool:
    """Compute with the threads of the process's OpenMP (torch's) instead of own ones. Whether it has one.

    OpenMP's threads spin for milliseconds after each use, where they are bound to cores on these, so that own
    threads would get half of a core beside them.
    """
    if native is None:
        return False
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if parallel is None:
        return False
    native.use_team(ctypes.cast(parallel, ctypes.c_void_p).value if share else 0)
    return share


def set_threads(count: int) -> None:
    """Use ``count`` (>= 1) threads in the C++ kernels from now on; at first it is the cores this process has.

    Waits for a kernel that is running. Torch's own threads are torch's: see ``torch.set_num_threads``.
    Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"threads must be at least 1, not {count}")
    if native is not None:
        native.set_threads(count)
