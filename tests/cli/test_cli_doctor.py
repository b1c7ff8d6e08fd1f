"""The doctor sees what is wrong, says what to do, and only what is broken fails."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fourfold.cli import checkup
from fourfold.cli.checkup import DoctorRecord
from fourfold.cli.doctor import doctor

app = typer.Typer()
app.command()(doctor)


def test_this_machine_is_examined_and_recorded(tmp_path):
    result = CliRunner().invoke(app, ["--json", str(tmp_path / "doctor.json")])
    assert result.exit_code == 0, result.output
    record = DoctorRecord.model_validate_json((tmp_path / "doctor.json").read_text())
    names = [check.name for check in record.checks]
    assert names == ["Python", "torch", "packages", "CPU", "memory", "disk", "C++ kernels", "GPU"]
    assert all(name in result.output for name in names)
    assert all(check.remedy for check in record.checks if check.state != "good")


@pytest.mark.parametrize(
    ("version", "state"), [(None, "broken"), ("2.10.1", "broken"), ("1.99.0+cpu", "broken")]
)
def test_a_torch_that_is_missing_or_old_is_broken(version, state):
    check = checkup.check_torch(version)
    assert check.state == state
    assert "pip install 'torch>=2.11'" in (check.remedy or "")


def test_little_memory_and_disk_are_warnings_with_a_remedy():
    assert checkup.check_memory(1_000_000_000).state == "warning"
    assert checkup.check_memory(16_000_000_000).state == "good"
    assert checkup.check_disk(Path(), 1_000_000).remedy
    assert checkup.check_disk(Path(), 10**12).state == "good"


def test_a_missing_package_is_broken_and_exits_with_1(monkeypatch, tmp_path):
    monkeypatch.setattr(checkup, "required_packages", lambda: iter(["numpy", "surely-not-installed"]))
    result = CliRunner().invoke(app, ["--json", str(tmp_path / "d.json")])
    assert result.exit_code == 1
    found = {c["name"]: c for c in json.loads((tmp_path / "d.json").read_text())["checks"]}
    assert found["packages"]["state"] == "broken"
    assert "pip install surely-not-installed" in found["packages"]["remedy"]


def test_kernels_that_were_not_built_are_a_warning(monkeypatch):
    """Everything works without them, only slower."""
    monkeypatch.setattr("fourfold.kernels.native_available", lambda: False)
    monkeypatch.setattr("fourfold.kernels.native_problem", lambda: "No module named _native")
    check = checkup.check_kernels()
    assert check.state == "warning" and "_native" in check.found and "g++" in (check.remedy or "")
