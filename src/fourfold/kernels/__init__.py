"""Fast versions of few operations; ``reference`` says what they must compute.

``linear`` is the one door: it looks at the weight's format and takes the first kernel that accepts the call,
else the general way in plain torch. Without the C++ extension everything still works, only slower.
"""

from fourfold.kernels.cpu import cpu_features, native_available, native_problem, set_threads, threads
from fourfold.kernels.dispatch import linear
from fourfold.kernels.rotate import rotate

__all__ = [
    "cpu_features",
    "linear",
    "native_available",
    "native_problem",
    "rotate",
    "set_threads",
    "threads",
]
