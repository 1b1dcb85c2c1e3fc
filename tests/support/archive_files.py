"""Creates tar files for the tests of archives and streams."""

import io
import tarfile
from pathlib import Path
from typing import Literal


def pack(archive: Path, files: dict[str, bytes], mode: Literal["w", "w:gz"] = "w") -> None:
    """Write files (name → content) into a tar file."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, mode) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the PNG files below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}
