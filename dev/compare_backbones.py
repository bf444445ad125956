#!/usr/bin/env python
"""Train each network over ConvNeXt-Atto and over its slim ResNet, both from random weights on
`shapes_train` and for the same time of the processor; the table of docs/backbones.md.

    python dev/compare_backbones.py FOLDER [--seeds 1] [--only NAME]

Takes an hour on one core. Every training leaves a JSON file in FOLDER and is not done again. The
page is written once all are there.
"""

import argparse
import json
import re
import shutil
import statistics
from pathlib import Path

from measured_training import measure
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/backbones.md"
START, END = "<!-- twins -->", "<!-- /twins -->"
NETWORKS = {"MNC": "mnc", "FCIS": "fcis", "Mask R-CNN": "mask_rcnn", "HTC": "htc"}
OTHER, OWN = "ConvNeXt-Atto", "slim ResNet"
# Random weights do not go with fixed norms.
RANDOM = ["MODEL.WEIGHTS=", "MODEL.RESNETS.NORM=GN"]
PILOTS = (20, 100)  # iterations; what is between them tells what one costs without the start


def run(folder: Path, name: str, config: str, options: list[str], test: bool = True) -> dict:
    """The result of a training, which is done unless it was before."""
    file = folder / f"{name}.json"
    if not file.exists():
        output = folder / "run" / name
        options = [*options, f"OUTPUT_DIR={output}", "LOG_PERIOD=100"]
        result = measure(config, options, "shapes_train", "shapes_val" if test else "")
        shutil.rmtree(output)
        file.write_text(json.dumps(result))
        print(name, result, flush=True)
    return json.loads(file.read_text())


def compare(folder: Path, title: str, seed: int) -> None:
    """Two trainings of one network, of equal time by what an iteration of each costs."""
    config = NETWORKS[title]
    configs = {OTHER: (f"{config}_tiny_convnext", []), OWN: (f"{config}_tiny", RANDOM)}
    cost = {}
    for backbone, (stem, options) in configs.items():
        seconds = [
            run(
                folder,
                f"{title}, {backbone}, {steps} iterations",
                stem,
                [*options, f"SOLVER.MAX_ITER={steps}"],
                test=False,
            )["seconds"]
            for steps in PILOTS
        ]
        cost[backbone] = seconds[1] - seconds[0]
    name = f"{title}, {{}}, seed {seed}"
    other = run(folder, name.format(OTHER), configs[OTHER][0], [f"SEED={seed}"])
    name, seconds = name.format(OWN), other["seconds"]
    steps = round(other["SOLVER.MAX_ITER"] * cost[OTHER] / cost[OWN])
    options = [*RANDOM, f"SEED={seed}"]
    first = f"first {name}"
    took = run(folder, first, configs[OWN][0], [*options, f"SOLVER.MAX_ITER={steps}"])["seconds"]
    if abs(took / seconds - 1) < 0.1:
        shutil.copy(folder / f"{first}.json", folder / f"{name}.json")
    else:  # pilots do not tell all that a training costs
        options.append(f"SOLVER.MAX_ITER={round(steps * seconds / took)}")
        run(folder, name, configs[OWN][0], options)


def table(folder: Path) -> str:
    """Of all networks, the mean of what is there of each."""
    rows = []
    for title in NETWORKS:
        for backbone in (OTHER, OWN):
            found = [json.loads(f.read_text()) for f in folder.glob(f"{title}, {backbone}, seed *")]
            if not found:
                raise SystemExit(f"error: {folder} has no training of {title} over {backbone}")
            mean = {k: statistics.mean(x[k] for x in found) for k in ("seconds", "AP", "AP50")}
            steps = found[0]["SOLVER.MAX_ITER"]
            cells = [f"{mean['seconds']:.0f}", f"{mean['AP']:.1f}", f"{mean['AP50']:.1f}"]
            rows.append([title, backbone, steps, *cells, len(found)])
    heads = ["network", "backbone", "iterations", "CPU s", "mask AP", "mask AP50", "seeds"]
    return tabulate(rows, heads, tablefmt="pipe", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", default="", help="networks whose name contains this")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for title in NETWORKS:
            if arguments.only in title:
                compare(arguments.folder, title, seed)
    text = PAGE.read_text(encoding="utf-8")
    made = f"{START}\n{table(arguments.folder)}\n{END}"
    PAGE.write_text(
        re.sub(rf"{START}.*{END}", lambda _: made, text, flags=re.DOTALL), encoding="utf-8"
    )
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
