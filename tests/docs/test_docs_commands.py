"""The commands that README shows are run as they stand, on a tiny model in the place of the reader's own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def blocks_of(text: str, language: str) -> list[str]:
    """The fenced blocks of ``language``, in order."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.e2e
def test_readme_commands_run(tiny_llama, tmp_path):
    blocks = blocks_of(README.read_text(), "sh")
    assert blocks, "README.md shows no ```sh block"
    (tmp_path / "my-model").symlink_to(tiny_llama)
    (tmp_path / "careful.yaml").write_text(blocks_of(README.read_text(), "yaml")[0])
    (tmp_path / "story.txt").write_text("It was a bright cold day in April. " * 200)
    script = "\n".join(["trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT", "set -eux", *blocks])
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert (tmp_path / "page.html").stat().st_size > 100_000


def test_the_map_names_files_that_exist():
    text = (README.parent / "docs" / "structure.md").read_text()
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_0-9]+\.py)`", text)
    assert len(named) >= 11
    missing = [name for name in named if not (README.parent / "src" / "fourfold" / name).is_file()]
    assert not missing
