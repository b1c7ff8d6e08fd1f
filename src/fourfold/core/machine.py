"""Which machine and which versions a figure was obtained on."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fourfold.core.records import Machine

REPORTED_PACKAGES = ("fourfold", "torch", "transformers", "numpy")


def describe_machine(gpu: str | None = None) -> Machine:
    """This machine; ``gpu`` is named by a caller that may import torch."""
    return Machine(
        cpu=cpu_name(),
        cores=usable_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=gpu,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions={name: v for name in REPORTED_PACKAGES if (v := installed_version(name))},
    )


def usable_cores() -> int:
    """Cores this process may run on, where the system tells it; all of them elsewhere."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's marketing name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def installed_version(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def now() -> str:
    """The time of a record: UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
