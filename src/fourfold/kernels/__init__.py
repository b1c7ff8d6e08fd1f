"""Fast versions of few operations; ``reference`` says what they must compute.

``linear`` is the one door: weights that ``pack`` has packed go to C++, all others the general way in plain
torch. Without the C++ extension everything still works, only slower.
"""

from fourfold.kernels.cpu import cpu_features, native_available, native_problem, set_threads, threads
from fourfold.kernels.dispatch import Weight, linear, pack
from fourfold.kernels.rotate import rotate

__all__ = [
    "Weight",
    "cpu_features",
    "linear",
    "native_available",
    "native_problem",
    "pack",
    "rotate",
    "set_threads",
    "threads",
]
