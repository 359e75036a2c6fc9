"""The SDK by itself: installed in an empty environment, its size and the time of its import.

    python benchmarks/sdk_footprint.py       # about half a minute; needs a package registry

Writes benchmarks/results/sdk_footprint.json.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from side_by_side import machine

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/sdk_footprint.json"
REPEATS = 15
# What the measured import must not have pulled in.
HEAVY = ("torch", "numpy", "transformers", "vllm", "fastapi", "rich", "typer")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin/python")
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", str(ROOT / "clients")], check=True, cwd=folder)
        listed = subprocess.run([*pip, "list", "--format=json"], capture_output=True, check=True)
        packages = {row["name"]: row["version"] for row in json.loads(listed.stdout)}
        wheels = Path(folder) / "wheels"
        subprocess.run(
            [*pip, "wheel", "--quiet", "--no-deps", "-w", wheels, str(ROOT / "clients")], check=True
        )
        (wheel,) = wheels.glob("demur-*.whl")
        times: dict[str, list[float]] = {"pass": [], "import demur": [], "import openai": []}
        subprocess.run([*pip, "install", "--quiet", "openai"], check=True)
        for turn in range(REPEATS + 1):
            for code, seconds in times.items():
                started = time.perf_counter()
                subprocess.run([python, "-c", code], check=True, cwd=folder)
                if turn > 0:  # the first one reads files from the disk
                    seconds.append(time.perf_counter() - started)
        check = f"import sys, demur; print([m for m in {HEAVY} if m in sys.modules])"
        heavy = subprocess.run([python, "-c", check], capture_output=True, text=True, check=True)
        size = wheel.stat().st_size
    medians = {code: statistics.median(seconds) for code, seconds in times.items()}
    own = medians["import demur"] - medians["pass"]
    result = {
        "benchmark": "sdk_footprint",
        "command": "python benchmarks/sdk_footprint.py",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": {"python": sys.version.split()[0], **packages},
        "packages_installed": sorted(set(packages) - {"pip", "setuptools"}),
        "heavy_modules_imported": heavy.stdout.strip(),
        "wheel_bytes": size,
        "seconds": {code: {"median": medians[code], "all": times[code]} for code in times},
        "import_seconds": own,
        "import_over_openai": own / (medians["import openai"] - medians["pass"]),
        "goals": [
            {
                "name": "import demur, beyond an empty interpreter, in seconds",
                "value": own,
                "bound": 0.5,
                "holds": own < 0.5,
            },
            {
                "name": "heavy modules imported",
                "value": heavy.stdout.strip(),
                "bound": "[]",
                "holds": heavy.stdout.strip() == "[]",
            },
        ],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"installed: {', '.join(result['packages_installed'])}")
    print(
        f"wheel: {size} bytes; import: {own:.3f} s, {result['import_over_openai']:.2f} of openai's"
    )
    print(f"heavy modules imported: {result['heavy_modules_imported']}")


if __name__ == "__main__":
    main()
