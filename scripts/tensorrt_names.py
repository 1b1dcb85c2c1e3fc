"""List the names in TensorRT's Python API, by release, from the strings in its compiled bindings.

    python scripts/tensorrt_names.py    downloads two wheels of bindings (1.3 MB each) and installs nothing

The bindings cannot be imported without TensorRT's libraries, which are not on PyPI. Their compiled
module contains every name as a string, or as the end of a longer string. The script writes
`tensorrt_names.json` next to `tests/runtime/backends/tensorrt/test_api.py`, which compares it with
the names that our code uses. For each release, the file lists the names that also occur in the
installed TensorRT-RTX or in our code.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import tensorrt_rtx

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "tests" / "runtime" / "backends" / "tensorrt" / "tensorrt_names.json"
WHEELS = {"10.16.1.11": "tensorrt-cu13-bindings", "11.4.0.106": "tensorrt-cu13-bindings"}


def names_of_rtx() -> set[str]:
    """Return the public names of the installed TensorRT-RTX module and of its classes."""
    names = set()
    for name in dir(tensorrt_rtx):
        names |= {name, *dir(getattr(tensorrt_rtx, name))}
    return {name for name in names if not name.startswith("_")}


def names_of_code() -> set[str]:
    """Return all attribute names in the runtime, which include those of TensorRT."""
    text = "".join(path.read_text() for path in (ROOT / "runtime").rglob("*.py"))
    return set(re.findall(r"\.([A-Za-z]\w+)", text))


def names_in(module: bytes, wanted: set[str]) -> list[str]:
    """Return the wanted names that are, or end, a NUL-terminated string of the module."""
    texts = {match.decode() for match in re.findall(rb"[A-Za-z_]\w*(?=\0)", module)}
    ends = {text[start:] for text in texts if len(text) < 80 for start in range(len(text))}
    return sorted(wanted & ends)


def main() -> None:
    wanted = names_of_rtx() | names_of_code()
    found = {}
    for version, package in WHEELS.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            subprocess.run([*command, f"{package}=={version}"], check=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                found[version] = names_in(wheel.read("tensorrt_bindings/tensorrt.so"), wanted)
    TARGET.write_text(json.dumps(found, indent=None, separators=(",", ":")).replace("],", "],\n") + "\n")
    print({version: len(names) for version, names in found.items()}, TARGET.stat().st_size)


if __name__ == "__main__":
    main()
