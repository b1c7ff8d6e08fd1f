"""The checks of ``fourfold doctor``: each says what it found and, unless that is good, what to do."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fourfold.core.machine import describe_machine, installed_version
from fourfold.core.records import Machine, Record

State = Literal["good", "warning", "broken"]
LEAST_TORCH = (2, 11)
LITTLE_MEMORY_BYTES = 4e9
LITTLE_DISK_BYTES = 5e9


class Check(Record):
    """One thing that was looked at; ``remedy`` says what to do unless it is good."""

    name: str
    state: State
    found: str
    remedy: str | None = None


class DoctorRecord(Record):
    """The result of ``fourfold doctor``."""

    kind: Literal["fourfold.doctor/1"] = "fourfold.doctor/1"
    machine: Machine
    checks: list[Check]


def examine(folder: Path) -> DoctorRecord:
    """Run all checks; ``folder`` says which disk to look at."""
    torch_check = check_torch(installed_version("torch"))
    machine = describe_machine(gpu=gpu_name() if torch_check.state != "broken" else None)
    checks = [
        Check(name="Python", state="good", found=machine.python),
        torch_check,
        check_packages(),
        Check(name="CPU", state="good", found=f"{machine.cpu}, {machine.cores} cores usable"),
        check_memory(available_memory_bytes() or machine.memory_bytes),
        check_disk(folder, shutil.disk_usage(folder).free),
    ]
    if torch_check.state != "broken":
        checks += [check_kernels(), check_gpu(machine.gpu)]
    return DoctorRecord(machine=machine, checks=checks)


def check_torch(version: str | None) -> Check:
    """torch is there, new enough, and can be imported. ``version`` is the installed one."""
    remedy = f"Install it: pip install 'torch>={LEAST_TORCH[0]}.{LEAST_TORCH[1]}'."
    if version is None:
        return Check(name="torch", state="broken", found="not installed", remedy=remedy)
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < LEAST_TORCH:
        return Check(name="torch", state="broken", found=f"{version} is too old", remedy=remedy)
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways, and each is this check's finding
        first_line = str(error).partition("\n")[0]
        return Check(name="torch", state="broken", found=f"{version}, {first_line}", remedy="Reinstall it.")
    return Check(name="torch", state="good", found=f"{version}, {torch.get_num_threads()} threads")


def check_packages() -> Check:
    """Every package that Fourfold needs is installed."""
    missing = [name for name in required_packages() if installed_version(name) is None]
    if missing:
        return Check(
            name="packages",
            state="broken",
            found=f"missing: {', '.join(missing)}",
            remedy=f"Install them: pip install {' '.join(missing)}.",
        )
    return Check(name="packages", state="good", found="all installed")


def required_packages() -> Iterator[str]:
    """Names of the packages that the installed Fourfold asks for, extras left out."""
    import re
    from importlib.metadata import PackageNotFoundError, requires

    try:
        requirements = requires("fourfold") or []
    except PackageNotFoundError:  # run from a source tree: nothing is declared
        return
    for requirement in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name and "extra ==" not in requirement:
            yield name.group()


def check_kernels() -> Check:
    """The C++ extension, and which of its paths this CPU takes."""
    from fourfold.kernels import cpu_features, native_available, native_problem

    if native_available():
        features = cpu_features()
        taken = [name for name, usable in features.items() if usable]
        lacking = [name for name, usable in features.items() if not usable]
        found = f"built; this CPU takes the {taken[-1]} path" if taken else "built"
        return Check(
            name="C++ kernels",
            state="good",
            found=found + (f" (not here: {', '.join(lacking)})" if lacking else ""),
        )
    return Check(
        name="C++ kernels",
        state="warning",
        found=f"not usable ({native_problem()}); plain torch does the work, and slower",
        remedy="Install g++ and then Fourfold again: pip install --force-reinstall --no-deps fourfold.",
    )


def check_gpu(name: str | None) -> Check:
    """A GPU that torch can see."""
    return Check(name="GPU", state="good", found=name or "none that torch sees; everything runs on the CPU")


def gpu_name() -> str | None:
    """The first GPU's name, or None."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def check_memory(available_bytes: int) -> Check:
    """Memory that programs can still take."""
    found = f"{available_bytes / 1e9:.1f} GB available"
    if available_bytes < LITTLE_MEMORY_BYTES:
        remedy = "Close other programs, or use small models: an engine needs the model's size and some more."
        return Check(name="memory", state="warning", found=found, remedy=remedy)
    return Check(name="memory", state="good", found=found)


def available_memory_bytes() -> int | None:
    """MemAvailable where the system tells it."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def check_disk(folder: Path, free_bytes: int) -> Check:
    """Room on the disk of ``folder``."""
    found = f"{free_bytes / 1e9:.1f} GB free at {folder}"
    if free_bytes < LITTLE_DISK_BYTES:
        remedy = "Make room, or write to another disk; `fourfold quantize --dry-run` tells what is needed."
        return Check(name="disk", state="warning", found=found, remedy=remedy)
    return Check(name="disk", state="good", found=found)
