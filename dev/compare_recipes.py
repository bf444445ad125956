#!/usr/bin/env python
"""Compare a recipe with a search by hand and with more augmentation, on the built-in data sets.

    python dev/compare_recipes.py FOLDER grid        size, rate and length by hand, at equal time
    python dev/compare_recipes.py FOLDER ablation    jitter, copy-paste, average of weights

Takes hours. Every training leaves a JSON file in FOLDER and is not done again, so that a search can
be stopped, continued and extended by --seeds. No training sees the test set: the weights that are
tested are the last ones. Time is that of the processor, which other programs disturb little.
"""

import argparse
import itertools
import json
import shutil
import statistics
from pathlib import Path

from measured_training import measure
from tabulate import tabulate

# Of what the recipe chooses: short side, learning rate, time. First one of them at a time, and a
# high rate for half of the time; then sizes together with rates.
GRID = [
    (1.0, 1.0, 1.0),
    *((size, 1.0, 1.0) for size in (0.7, 1.4)),
    *((1.0, rate, 1.0) for rate in (2.0, 0.5, 4.0)),
    (1.0, 2.0, 0.5),
    *itertools.product((0.7, 1.4), (2.0, 0.5), [1.0]),
]
PILOT = 12  # iterations that tell what one costs at a size
NARROW = "RECIPE.TRAIN_SCALES=[0.8,0.9,1.0]"
HELPS = {
    "the recipe": [],
    "copy-paste into half of the images": ["INPUT.COPY_PASTE.PROB=0.5"],
    "short sides of 0.8 to 1": [NARROW],
    "short sides of 0.8 to 1, copy-paste into half of the images": [
        NARROW,
        "INPUT.COPY_PASTE.PROB=0.5",
    ],
    "short sides of 0.8 to 1, average of the weights, 0.99": [NARROW, "SOLVER.EMA_DECAY=0.99"],
    "short sides of 0.5 to 1.5": ["RECIPE.TRAIN_SCALES=[0.5,0.75,1.0,1.25,1.5]"],
    "large-scale jitter, 0.5 to 1.5": [
        "INPUT.LSJ.ENABLED=true",
        "INPUT.LSJ.MIN_SCALE=0.5",
        "INPUT.LSJ.MAX_SCALE=1.5",
    ],
}


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the results")
    parser.add_argument("plan", choices=["grid", "ablation"])
    parser.add_argument("--config", default="configs/mask_rcnn_tiny_finetune.yaml")
    parser.add_argument("--data", choices=["scenes", "big"], default="scenes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", default="", help="trainings whose name contains this")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    return parser


class Comparison:
    """Trainings of one config on one data set, kept in a folder."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.prefix = f"{Path(arguments.config).stem}, {arguments.data}"

    def find(self, name: str, seed: int) -> dict | None:
        """The result of a training, if there is one."""
        file = self.arguments.folder / f"{self.prefix}, {name}, seed {seed}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def run(self, name: str, seed: int, options: list[str], test: bool = True) -> dict | None:
        """The result of a training, which is done unless it was before."""
        kept, arguments = self.find(name, seed), self.arguments
        if kept or arguments.table or arguments.only not in name:
            return kept
        output = arguments.folder / "run" / f"{self.prefix}, {name}, seed {seed}"
        options = [*options, f"OUTPUT_DIR={output}", f"SEED={seed}", "LOG_PERIOD=100"]
        data = f"shapes_{arguments.data}"
        tested = f"{data}_val" if test else ""
        result = measure(arguments.config, options, f"{data}_train", tested)
        shutil.rmtree(output)
        file = arguments.folder / f"{self.prefix}, {name}, seed {seed}.json"
        file.write_text(json.dumps(result))
        shown = f"mask AP {result['AP']:.1f}, " if test else ""
        print(f"{file.stem}: {shown}{result['seconds']:.0f} s", flush=True)
        return result

    def row(self, name: str) -> list | None:
        """Of a table: mean and range over the seeds."""
        found = [x for seed in range(100) if (x := self.find(name, seed))]
        if not found:
            return None
        values = [x["AP"] for x in found]
        shown = ", ".join(f"{value:.1f}" for value in values)
        seconds = statistics.mean(x["seconds"] for x in found)
        one = found[0]
        numbers = [one["INPUT.MIN_SIZE_TEST"], one["SOLVER.BASE_LR"], one["SOLVER.MAX_ITER"]]
        return [name, *numbers, round(seconds), shown, round(statistics.mean(values), 1)]

    def print_table(self, names: list[str]) -> None:
        rows = sorted(filter(None, map(self.row, names)), key=lambda row: -row[-1])
        heads = ["", "short side", "rate", "iterations", "CPU s", "mask AP by seed", "mean"]
        print(f"\n{self.prefix}\n\n{tabulate(rows, heads, tablefmt='pipe')}")


def compare_grid(comparison: Comparison, seeds: list[int]) -> None:
    """The recipe, and each combination of factors, at equal time or less."""
    names = ["the recipe"]
    for seed in seeds:
        recipe = comparison.run("the recipe", seed, [])
        own = recipe and (side := recipe["INPUT.MIN_SIZE_TEST"])
        for size, rate, length in GRID:
            if (size, rate, length) == (1, 1, 1):
                continue
            name = f"size x{size:g}, rate x{rate:g}, time x{length:g}"
            names.append(name)
            if not own:
                continue
            options = [f"RECIPE.IMAGE_SIZE={16 * round(size * side / 16)}"]
            short = [f"SOLVER.MAX_ITER={PILOT}", *options]
            cost = comparison.run(f"pilot, size x{size:g}", 0, short, test=False)
            unit = comparison.run("pilot, size x1", 0, [short[0]], test=False)
            if cost and unit:
                steps = recipe["SOLVER.MAX_ITER"] * length * unit["seconds"] / cost["seconds"]
                options += [f"SOLVER.MAX_ITER={round(steps)}"]
                options += [f"SOLVER.BASE_LR={recipe['SOLVER.BASE_LR'] * rate:g}"]
                comparison.run(name, seed, options)
    comparison.print_table(list(dict.fromkeys(names)))


def compare_helps(comparison: Comparison, seeds: list[int]) -> None:
    """The recipe with one help more."""
    for seed, name in itertools.product(seeds, HELPS):
        recipe, options = comparison.run("the recipe", seed, []), HELPS[name]
        if recipe and any("LSJ" in option for option in options):
            side = recipe["INPUT.MIN_SIZE_TEST"]
            options = [*options, f"INPUT.LSJ.SIZE=[{side},{side * 4 // 3}]"]
        comparison.run(name, seed, options)
    comparison.print_table(list(HELPS))


def main() -> None:
    arguments = argument_parser().parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    plans = {"grid": compare_grid, "ablation": compare_helps}
    plans[arguments.plan](Comparison(arguments), arguments.seeds)


if __name__ == "__main__":
    main()
