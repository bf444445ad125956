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
import multiprocessing
import shutil
import statistics
import time
from pathlib import Path

from tabulate import tabulate

# Of what the recipe chooses: short side, learning rate, time.
SIZES, RATES = (0.7, 1.0, 1.4), (0.5, 1.0, 2.0)
# Every size and rate for the time of the recipe, and its own size for half of it.
GRID = [*itertools.product(SIZES, RATES, [1.0]), *itertools.product([1.0], RATES, [0.5])]
PILOT = 12  # iterations that tell what one costs at a size
HELPS = {
    "the recipe": [],
    "large-scale jitter, 0.5 to 1.5": [
        "INPUT.LSJ.ENABLED=true",
        "INPUT.LSJ.MIN_SCALE=0.5",
        "INPUT.LSJ.MAX_SCALE=1.5",
    ],
    "copy-paste into half of the images": ["INPUT.COPY_PASTE.PROB=0.5"],
    "average of the weights, 0.99": ["SOLVER.EMA_DECAY=0.99"],
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


def _work(config: str, data: str, options: list[str], test: bool, pipe) -> None:
    """One training and its test, in a process of its own."""
    from d2ext.engine.loop import evaluate_checkpoint, train
    from d2ext.engine.setup import build_experiment

    common = [*options, f"DATASETS.TRAIN=shapes_{data}_train"]
    experiment = build_experiment(config, [*common, "DATASETS.TEST=()"])
    started = time.process_time()
    train(experiment, overwrite=True)
    result = {"seconds": time.process_time() - started}
    for key in ("INPUT.MIN_SIZE_TEST", "SOLVER.BASE_LR", "SOLVER.MAX_ITER"):
        result[key] = experiment.setting(key, None)
    if test:
        common.append(f"DATASETS.TEST=shapes_{data}_val")
        result.update(evaluate_checkpoint(build_experiment(config, common), resume=True)["segm"])
    pipe.send(result)


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
        receive, send = multiprocessing.get_context("spawn").Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(arguments.config, arguments.data, options, test, send)
        )
        process.start()
        send.close()
        try:
            result = receive.recv()
        except EOFError:
            raise SystemExit(f"error: '{name}' failed; see {output}") from None
        process.join()
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
