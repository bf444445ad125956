#!/usr/bin/env python3
"""Write the table of CONTRIBUTING.md from what `make coverage` has measured, the file `.coverage`.

dev/write_coverage.py
"""

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
FIRST, LAST = "<!-- coverage-table -->\n", "<!-- /coverage-table -->"
COUNTS = ("num_statements", "covered_lines", "num_branches", "covered_branches")


def package(path: str) -> str:
    """What a file is counted under: `d2ext/data`, `projects/HTC`, `tools`."""
    parts = Path(path).parts
    if parts[0] in ("d2ext", "projects"):
        return "/".join(parts[:2]) if len(parts) > 2 else "d2ext/*.py"
    return parts[0]


def table(report: dict) -> str:
    """Markdown of coverage.py's JSON report."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for path, file in report["files"].items():
        for name in (package(path), "**all**"):
            for place, key in enumerate(COUNTS):
                counts[name][place] += file["summary"][key]
    text = "| | statements | reached | branches | reached |\n|---|---|---|---|---|\n"
    for name in sorted(counts, key=lambda x: (x == "**all**", x)):
        lines, hit, branches, taken = counts[name]
        shares = [f"{100 * a / b:.0f}%" if b else "-" for a, b in ((hit, lines), (taken, branches))]
        shown = name if name == "**all**" else f"`{name}`"
        text += f"| {shown} | {lines} | {shares[0]} | {branches} | {shares[1]} |\n"
    return text


def put(page: Path, text: str) -> None:
    """Replace the table of a page."""
    head, _, rest = page.read_text(encoding="utf-8").partition(FIRST)
    page.write_text(head + FIRST + text + LAST + rest.partition(LAST)[2], encoding="utf-8")


def main() -> int:
    """Replace the table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "coverage.json"
        command = [sys.executable, "-m", "coverage", "json", "--quiet", "-o", str(path)]
        if subprocess.run(command, cwd=ROOT).returncode:
            print("error: nothing is measured; run make coverage", file=sys.stderr)
            return 1
        report = json.loads(path.read_text())
    put(PAGE, table(report))
    print(f"wrote the table of {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
