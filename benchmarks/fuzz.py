"""Pass damaged and malicious files to all readers, which may raise advprop's errors only.

    python -m benchmarks.fuzz             500 cases of each of five kinds, about a minute
    python -m benchmarks.fuzz --native    also pass valid ONNX files to TensorRT-RTX, in a child process

The generators are in `tests/support/fuzzing.py`; `tests/runtime/test_fuzz.py` runs a few cases of
each kind.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.support.fuzzing import KINDS, fuzz


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500, help="cases per kind (default: 500)")
    parser.add_argument("--native", action="store_true", help="pass valid ONNX files to TensorRT-RTX")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="kinds of input")
    parser.add_argument("--crashes", type=Path, default=Path(), help="folder for files that crash TensorRT-RTX")
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory(dir=arguments.crashes) as folder:
            start = time.monotonic()
            counts = fuzz(kind, arguments.cases, Path(folder), seeded=False, native=arguments.native)
        results = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        print(f"{kind}: {counts.total()} cases in {time.monotonic() - start:.0f} s: {results}", flush=True)


if __name__ == "__main__":
    main()
