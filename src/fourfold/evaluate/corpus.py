"""The texts that models are judged on: three small ones that come with the package, or the caller's files."""

from importlib import resources
from pathlib import Path

from fourfold.core.errors import FourfoldError, UsageError


def default_texts() -> dict[str, str]:
    """Name -> text of the package's own texts; ``texts/ATTRIBUTION.md`` tells their sources and licences."""
    folder = resources.files("fourfold.evaluate") / "texts"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
    return {f.name.removesuffix(".txt"): f.read_text("utf-8") for f in files if "LICENSE" not in f.name}


def read_texts(paths: list[Path]) -> dict[str, str]:
    """Name -> text of UTF-8 files; the name is the file's stem, or its path where two stems are the same.

    Raises UsageError for a file that is not there, FourfoldError for one that is not UTF-8.
    """
    stems = [path.stem for path in paths]
    names = [p.stem if stems.count(p.stem) == 1 else str(p) for p in paths]
    return {name: _read(path) for name, path in zip(names, paths, strict=True)}


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UsageError(f"Text {path} cannot be read ({error.strerror}). Give a UTF-8 text file.") from error
    except UnicodeDecodeError as error:
        raise FourfoldError(
            f"Text {path} is not UTF-8 (byte {error.start}). Convert it, e.g. with `iconv -t utf-8`."
        ) from error
