#!/usr/bin/env python
"""Convert a checkpoint of another program (MMDetection, MXNet, Caffe, torchvision) for a project of
this collection, and print what became of every tensor. Configs accept such files directly, too."""

import argparse
import sys

import torch

from d2ext.checkpoint import list_importers, read_file
from d2ext.checkpoint.convert import export_file, import_file, save_weights
from d2ext.checkpoint.settings import settings_to_config
from d2ext.config import load_projects, project_configs
from d2ext.engine import Experiment, build_experiment
from d2ext.engine.cli import run_guarded
from d2ext.engine.provenance import CONFIG_KEY, config_to_store, portable_copy
from d2ext.errors import UserError


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", metavar="NAME", help="such as htc; needed without a config")
    parser.add_argument("--in", dest="source", required=True, metavar="FILE", help="the checkpoint")
    parser.add_argument(
        "--out", metavar="FILE", help=".pkl, .pth or .safetensors to write; none: only report"
    )
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help=".yaml or .py of the model (default: the project's config that fits the file)",
    )
    parser.add_argument(
        "--partial", action="store_true", help="accept missing parameters and unused tensors"
    )
    parser.add_argument(
        "--brief", action="store_true", help="leave tensors that were simply renamed out"
    )
    parser.add_argument(
        "--export",
        action="store_true",
        help="the other way round: --in is ours, --out gets MMDetection's names",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY=VALUE", help="config overrides")
    return parser


def find_config(project: str, source: str) -> tuple[str, list[str]]:
    """The config of a project that fits a file, and overrides for it."""
    file = read_file(source)
    for importer in list_importers():
        if importer.project != project or importer.config is None:
            continue
        found = importer.config(file)
        if found is None:
            continue
        name, overrides = found
        folder = project_configs(project)
        if folder is not None and (folder / name).is_file():
            return str(folder / name), overrides
    raise UserError(f"no config of project '{project}' is known for '{source}': add --config-file")


def build_model(experiment: Experiment, device: str) -> torch.nn.Module:
    """The model of a config; on "meta" without values, where only names and shapes matter."""
    experiment = portable_copy(experiment)
    experiment.set_device(device)
    with torch.device(device):
        return experiment.build_model()


def main() -> None:
    args = argument_parser().parse_args()
    projects = load_projects()
    if args.project and args.project not in projects:
        raise UserError(f"no project '{args.project}'; known are {', '.join(projects)}")
    if not args.project and not (args.config_file and not args.export):
        raise UserError("add --project (and --config-file to choose the model)")
    if args.config_file:
        config, overrides = args.config_file, []
    elif args.export:
        raise UserError("--export needs --config-file, the config of the checkpoint")
    else:
        config, overrides = find_config(args.project, args.source)
    print(f"model: {config} {' '.join([*overrides, *args.opts])}".rstrip())
    experiment = build_experiment(config, [*overrides, *args.opts], with_data=False)
    model = build_model(experiment, "cpu" if args.export else "meta")
    if args.export:
        if not args.out:
            raise UserError("--export needs --out")
        weights = export_file(args.source, model, args.project, args.out)
        print(f"wrote {args.out}: {len(weights)} tensors")
        return
    conversion = import_file(args.source, model, args.project)
    print(conversion.table(every=not args.brief))
    for key, value in conversion.settings.items():
        print(f"setting {key} = {value}")
    for line in conversion.notes:
        print(f"note: {line}")
    conversion.check(args.source, partial=args.partial)
    if args.out:
        settings_to_config(experiment.cfg, conversion.settings)
        metadata = {**conversion.metadata, CONFIG_KEY: config_to_store(experiment)}
        save_weights(args.out, conversion.weights, metadata)
        print(f"wrote {args.out}: {len(conversion.weights)} tensors")


if __name__ == "__main__":
    sys.exit(run_guarded(main))
