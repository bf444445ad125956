#!/usr/bin/env python
"""Write the tables of docs/model_zoo.md from run folders, by way of docs/model_zoo.json.

    python dev/write_model_zoo.py FOLDER ...     collect the runs below these folders, write both
    python dev/write_model_zoo.py FOLDER --keep  and keep the JSON file's runs that are not there
    python dev/write_model_zoo.py                write the page again from the JSON file

A run is a folder with `run.json` of `dev/train_zoo.py`, the config, and `metrics.json` with
`model_final.pth` of a training or `inference/scores.json` of an evaluation. No number is on the
page without the checksums of the files that it is from.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from zoo_plan import CHAINS, RUNS, Step

from d2ext.engine.scores import file_digest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "model_zoo.md"
FIRST, LAST = "<!-- measured -->\n", "<!-- /measured -->"
KEPT = ("segm/AP", "segm/AP50", "segm/AP75", "bbox/AP", "bbox/AP50")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument(
        "--keep", action="store_true", help="also keep runs of the JSON file that are not there"
    )
    return parser


def read_run(folder: Path) -> dict:
    """What the page says about a run, with the checksums of its files.

    Raises:
        ValueError: files are missing, or the run has not reached its last iteration.
    """
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    if record["weights_of"]:
        source = config = folder / "inference"
        scores = json.loads((source / "scores.json").read_text(encoding="utf-8"))
        (found,) = scores["results"].values()
        results = {f"{task}/{key}": x for task, rest in found.items() for key, x in rest.items()}
        weights, measured = scores["sha256"], source / "scores.json"
    else:
        config, measured = folder, folder / "metrics.json"
        lines = [json.loads(x) for x in measured.read_text(encoding="utf-8").splitlines()]
        results = next((x for x in reversed(lines) if KEPT[0] in x), None)
        weights = file_digest(str(folder / "model_final.pth"))
        if not results or not weights:
            raise ValueError(f"{folder} has no evaluation, or no model_final.pth")
    settings = yaml.safe_load((config / "config.yaml").read_text(encoding="utf-8"))
    if not record["weights_of"] and results["iteration"] + 1 < settings["SOLVER"]["MAX_ITER"]:
        raise ValueError(f"{folder}: the last evaluation is of iteration {results['iteration']}")
    return {
        **record,
        "iterations": settings["SOLVER"]["MAX_ITER"],
        "images_per_iteration": settings["SOLVER"]["IMS_PER_BATCH"],
        "train": settings["DATASETS"]["TRAIN"],
        "test": settings["DATASETS"]["TEST"],
        "results": {key: round(results[key], 3) for key in KEPT},
        "sha256": {
            "weights": weights,
            measured.name: file_digest(str(measured)),
            "config.yaml": file_digest(str(config / "config.yaml")),
        },
    }


def collect(folders: list[Path], kept: Sequence[dict] = ()) -> list[dict]:
    """All runs below the folders that belong to the plan, as it is now.

    Args:
        kept: runs that stay where the folders do not have them.

    Raises:
        ValueError: see `read_run`; or a run is there that the plan describes differently.
    """
    planned = {run.name: run for run in RUNS}
    runs = [read_run(path.parent) for folder in folders for path in folder.rglob("run.json")]
    known = {(run["name"], run["seed"]) for run in runs}
    runs += [run for run in kept if (run["name"], run["seed"]) not in known]
    for run in runs:
        plan = planned.get(run["name"])
        if plan is None or (plan.config, list(plan.options)) != (run["config"], run["options"]):
            raise ValueError(f"{run['name']}, seed {run['seed']}: not as in dev/zoo_plan.py")
    return sorted(runs, key=lambda run: (run["name"], run["seed"]))


def by_seed(runs: list[dict], name: str, metric: str) -> dict[int, float]:
    return {x["seed"]: x["results"][metric] for x in runs if x["name"] == name}


def spread(values: list[float]) -> str:
    """Mean and standard deviation, of one value only itself."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def effect(step: Step, runs: list[dict], metric: str) -> tuple[float, float] | None:
    """Mean difference to the run that a step is compared with, by seed, and its standard error.

    None with less than two seeds that both have.
    """
    ours, theirs = by_seed(runs, step.run, metric), by_seed(runs, step.against, metric)
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if len(differences) < 2:
        return None
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def verdict(found: tuple[float, float] | None, published: float | None) -> str:
    """Whether the sign of an effect is the published one; two standard errors settle it."""
    if found is None or published is None:
        return ""
    mean, error = found
    if abs(mean) < 2 * error:
        return "not settled"
    return "same sign" if (mean > 0) == (published > 0) else "**other sign**"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def networks(runs: list[dict]) -> str:
    """Table of everything that is there."""
    rows = []
    for plan in RUNS:
        own = [run for run in runs if run["name"] == plan.name]
        if not own:
            continue
        values = [spread([run["results"][key] for run in own]) for key in KEPT]
        minutes = statistics.mean(run["cpu_seconds"] for run in own) / 60
        length = "test only" if plan.weights_of else str(own[0]["iterations"])
        spent = "" if plan.weights_of else f"{minutes:.1f}"
        seeds = ", ".join(str(run["seed"]) for run in own)
        rows.append([f"`{plan.name}`", length, seeds, *values, spent])
    heads = ["run", "iterations", "seeds", *KEPT, "processor minutes"]
    return table(heads, rows)


def chain_table(steps: tuple[Step, ...], runs: list[dict], metric: str) -> str:
    values = {step.run: step.published for step in steps}
    rows = []
    for step in steps:
        own = list(by_seed(runs, step.run, metric).values())
        if not own:
            continue
        published = f"{step.published}" if step.published is not None else ""
        row = [step.about, spread(own), "", published, "", ""]
        if step.against:
            found, base = effect(step, runs, metric), values.get(step.against)
            theirs = None
            if step.published is not None and base is not None:
                theirs = step.published - base
            row[2] = f"{found[0]:+.1f} ± {found[1]:.1f}" if found else "-"
            row[4] = f"{theirs:+.1f}" if theirs is not None else ""
            row[5] = verdict(found, theirs)
        rows.append(row)
    heads = ["", metric, "difference", "published", "its difference", "effect"]
    return table(heads, rows)


def measured(runs: list[dict]) -> str:
    """The part of the page that is written by this program."""
    counted = sum(not run["weights_of"] for run in runs)
    sets = {(tuple(run["train"]), tuple(run["test"])) for run in runs}
    ((train, test),) = sets
    text = f"{counted} trainings on `{train[0]}`, tested on `{test[0]}`, commits "
    text += ", ".join(f"`{name}`" for name in sorted({run["commit"] for run in runs})) + ".\n\n"
    text += networks(runs)
    for chain in CHAINS:
        if len({step.run for step in chain.steps} & {run["name"] for run in runs}) < 2:
            continue  # nothing to compare yet
        text += f"\n### {chain.title}\n\nPublished: {chain.published}.\n\n"
        text += chain_table(chain.steps, runs, chain.metric)
    return text


def put(page: Path, text: str) -> None:
    """Replace what is between the markers of a page."""
    head, _, rest = page.read_text(encoding="utf-8").partition(FIRST)
    page.write_text(head + FIRST + text + LAST + rest.partition(LAST)[2], encoding="utf-8")


def main() -> int:
    arguments = argument_parser().parse_args()
    kept = PAGE.with_suffix(".json")
    try:
        if arguments.folders:
            old = json.loads(kept.read_text(encoding="utf-8")) if arguments.keep else []
            runs = collect(arguments.folders, old)
            kept.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
        runs = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    put(PAGE, measured(runs))
    print(f"{len(runs)} runs: wrote {PAGE.name} and {kept.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
