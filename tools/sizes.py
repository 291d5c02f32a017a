"""What an installation takes: bytes of every package, and which of them a picture imports, in a fresh environment.

    python tools/sizes.py                    a new virtual environment with what is needed, and nothing else
    python tools/sizes.py --extra hub,bars   with extras of pyproject.toml
    python tools/sizes.py --here             this environment, as it is

Prints a table, byte code not counted. The embedded model is drawn with, so the environment is known to be enough.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Runs in the environment that is measured. Packages whose RECORD lists no file (editable ones) are of no size.
MEASURE = """
import json, sys
from importlib.metadata import distributions, packages_distributions
import s3dit
pipe = s3dit.Pipeline.load(device="cpu")
pipe("a red star", seed=1, num_inference_steps=1)
places = packages_distributions()
used = {each for name in sys.modules for each in places.get(name.partition(".")[0], ())}
rows = {}
for each in distributions():
    files = [each.locate_file(file) for file in each.files or ()]
    size = sum(file.stat().st_size for file in files if file.is_file())
    rows[each.name] = {"version": each.version, "bytes": size, "imported": each.name in used}
print(json.dumps(rows))
"""


def measure(python: str, **options: Any) -> dict[str, dict[str, Any]]:
    """Version, bytes and whether a picture imports it, of every package that a Python has."""
    done = subprocess.run([python, "-c", MEASURE], capture_output=True, text=True, check=True, **options)
    rows: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return rows


def fresh(extras: str, python: str) -> dict[str, dict[str, Any]]:
    """The same of a new environment of a Python, with the engine and its extras."""
    with tempfile.TemporaryDirectory() as folder:
        if python == sys.executable:
            venv.create(folder, with_pip=True)
        else:
            subprocess.run([python, "-m", "venv", folder], check=True)
        own = next(
            path for path in (Path(folder) / "bin" / "python", Path(folder) / "Scripts" / "python.exe") if path.exists()
        )
        wanted = f"{ROOT}[{extras}]" if extras else str(ROOT)
        install = [str(own), "-m", "pip", "install", "-q", "--no-compile", "-c", str(ROOT / "constraints.txt"), wanted]
        subprocess.run(install, check=True)
        return measure(str(own), cwd=folder)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown, the largest first, those below a megabyte together."""
    order = sorted(rows.items(), key=lambda item: -item[1]["bytes"])
    small = [row for _, row in order if row["bytes"] < 1e6]
    lines = ["| package | MB | a picture imports it |", "|---|---|---|"]
    for name, row in order:
        if row["bytes"] >= 1e6:
            lines.append(
                f"| {name} {row['version']} | {row['bytes'] / 1e6:,.0f} | {'yes' if row['imported'] else 'no'} |"
            )
    lines.append(f"| {len(small)} smaller ones | {sum(row['bytes'] for row in small) / 1e6:,.0f} | |")
    lines.append(f"| all | {sum(row['bytes'] for row in rows.values()) / 1e6:,.0f} | |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", default="", help="extras, separated by commas")
    parser.add_argument("--python", default=sys.executable, help="the Python of the new environment (default: this)")
    parser.add_argument("--here", action="store_true", help="measure this environment instead")
    args = parser.parse_args()
    print(table(measure(sys.executable, cwd=ROOT) if args.here else fresh(args.extra, args.python)))


if __name__ == "__main__":
    main()
