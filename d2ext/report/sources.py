"""From a word of the command line to a model: a run's folder, weights, a file of ONNX, or saved
predictions."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from d2ext.checkpoint import read_metadata
from d2ext.config import find_config
from d2ext.data import get_dataset_records, parse_register, register_coco_dataset
from d2ext.data.folder import find_data
from d2ext.engine import Predictor
from d2ext.engine.onnx_predictor import OnnxModel, choose_engine
from d2ext.engine.provenance import CONFIG_KEY, class_difference
from d2ext.errors import UserError
from d2ext.evaluation import GroundTruth, load_ground_truth
from d2ext.evaluation.results import fit_results, read_results, to_detections
from d2ext.report.entry import Entry
from d2ext.report.running import has_stages, predict_records, predict_stages

from detectron2.data import MetadataCatalog

_USUAL = {"model_best", "model_final", "coco_instances_results", "predictions"}


class Source(NamedTuple):
    """Where the predictions of one model come from.

    Attributes:
        text: as the user wrote it.
        name: for the report.
        weights: a checkpoint; None for saved predictions.
        config: a config file; None: the one inside the checkpoint.
        results: saved predictions, a JSON file; None for a model.
        folder: of the run, with its `metrics.json`; None if there is none.
    """

    text: str
    name: str
    weights: str | None = None
    config: str | None = None
    results: str | None = None
    folder: str | None = None


def parse_source(text: str) -> Source:
    """What a word such as `output/run1`, `model.pth`, `config.yaml,model.pth` or `results.json`
    means, with `NAME=` in front if it is to have another name.

    Raises:
        UserError: there is no such file, or it is none of these.
    """
    name, equals, rest = text.partition("=")
    if not equals or os.path.exists(text):
        name, rest = "", text
    parts = [part.strip() for part in rest.split(",")] if not os.path.exists(rest) else [rest]
    if not all(parts) or len(parts) > 2:
        raise UserError(
            f"cannot read model '{text}'; write [NAME=]RUN_FOLDER, WEIGHTS, CONFIG,WEIGHTS or "
            "RESULTS.json"
        )
    path = os.path.expanduser(parts[-1])
    if not os.path.exists(path):
        raise UserError(
            f"model '{text}': {path} does not exist; give the folder of a training, a checkpoint, "
            "or a file of predictions"
        )
    config = find_config(parts[0]) if len(parts) == 2 else None
    if os.path.isdir(path):
        weights = find_weights(path)
        return Source(text, name or Path(path).resolve().name, weights, config, None, path)
    name = name or _usual_name(Path(path))
    if path.endswith(".json"):
        if config:
            raise UserError(f"model '{text}': predictions need no config; give the file alone")
        return Source(text, name, results=path)
    beside = os.path.dirname(path) or "."
    run = beside if os.path.isfile(os.path.join(beside, "metrics.json")) else None
    return Source(text, name, path, config, None, run)


def _usual_name(path: Path) -> str:
    """The name of a file, or that of its run where all runs have one of this name."""
    if path.stem not in _USUAL and not re.fullmatch(r"model_\d+", path.stem):
        return path.stem
    folder = path.resolve().parent
    if folder.parent.name == "inference":
        folder = folder.parents[1]
    return folder.name or path.stem


def find_weights(folder: str) -> str:
    """The checkpoint of a run that counts: the best one where it kept one, else the last.

    Raises:
        UserError: there is none.
    """
    last = Path(folder, "last_checkpoint")
    named = last.read_text(encoding="utf-8").strip() if last.is_file() else ""
    for name in ("model_best.pth", "model_final.pth", os.path.basename(named)):
        if name and Path(folder, name).is_file():
            return str(Path(folder, name))
    raise UserError(
        f"folder {folder} has no model_best.pth, model_final.pth or last checkpoint; give the "
        "folder of a training, or a checkpoint"
    )


def unique_names(sources: Sequence[Source]) -> list[Source]:
    """The sources, with numbers behind names that several have."""
    taken: set[str] = set()
    named = []
    for source in sources:
        name, number = source.name, 1
        while name in taken:
            number += 1
            name = f"{source.name} {number}"
        taken.add(name)
        named.append(source._replace(name=name))
    return named


def is_onnx(source: Source) -> bool:
    """Whether it is a file that `d2ext export` wrote."""
    return (source.weights or "").endswith(".onnx")


def build_source_predictor(
    source: Source, overrides: Sequence[str] = (), device: str | None = None
) -> Predictor:
    """The model of a source, by the config that was given, the one inside the weights, or that
    beside them.

    Raises:
        UserError: see `Predictor`.
    """
    config, weights = source.config, source.weights or ""
    if is_onnx(source):
        exported = choose_engine(weights, unused=[x for x in (config, *overrides) if x])
        assert exported is not None
        return exported
    if config is None and not isinstance(read_metadata(weights).get(CONFIG_KEY), str):
        beside = os.path.join(source.folder or os.path.dirname(weights), "config.yaml")
        config = beside if os.path.isfile(beside) else None
    if config is None:
        return Predictor.from_weights(weights, overrides, device=device)
    return Predictor(config, weights, overrides, device=device)


def choose_data(
    data: str | None, images: str | None, register: Sequence[str], predictor: Predictor | None
) -> str:
    """Register what a command line names and say which set to compare on.

    Args:
        data: folder with `val.json` or `test.json`, or the name of a set; see `find_data`.
        images: folder of its images, where they are elsewhere.
        register: `--register` arguments; without `data`, the first one is the set.
        predictor: of the first model: without the others, the first test set of its config.

    Raises:
        UserError: nothing names a set, or there is none of this name.
    """
    for text in register:
        register_coco_dataset(*parse_register(text))
    if data:
        if any(parse_register(text).name == data for text in register):
            return data
        names, texts = find_data(data, images)
        part = next(part for part in ("val", "test", "train") if part in names)
        for text in texts:
            if parse_register(text).name == names[part]:
                register_coco_dataset(*parse_register(text))
        return names[part]
    if register:
        return parse_register(register[0]).name
    sets = predictor.experiment.test_sets() if predictor is not None else []
    if predictor is None or not sets:
        raise UserError("which data set? give --data FOLDER or --register NAME=ANN.json,IMAGES")
    for text in predictor.experiment.unread:
        if parse_register(text).name == sets[0]:
            register_coco_dataset(*parse_register(text))
    return sets[0]


def load_truth(name: str) -> tuple[list[dict], GroundTruth]:
    """Records and annotations of a data set, images in the same order.

    Raises:
        UserError: it has no images or no annotations.
    """
    records = {record["image_id"]: record for record in get_dataset_records(name)}
    truth = load_ground_truth(name) if records else None
    if truth is None or not truth.images:
        raise UserError(f"data set '{name}' has no annotated images to compare on")
    kept = [image for image in truth.images if image.image_id in records]
    return [records[image.image_id] for image in kept], truth._replace(images=kept)


def predicted_entry(
    source: Source,
    predictor: Predictor,
    records: Sequence[dict],
    truth: GroundTruth,
    stages: bool = True,
    rename_classes: bool = False,
) -> Entry:
    """Let a model predict on a data set.

    Args:
        source: of the model.
        predictor: as `build_source_predictor` makes it.
        records, truth: of the data set, see `load_truth`.
        stages: with the result after each stage, where a model has stages.
        rename_classes: take the classes of the data for those of the model, under other names.

    Raises:
        UserError: the classes are not those of the data.
    """
    check_names(source, predictor.class_names, truth.class_names, rename_classes)
    detections, speed = predict_records(predictor, records, truth, source.name)
    model: Any = predictor.model
    network, num_parameters = type(model).__name__, sum(p.numel() for p in model.parameters())
    if isinstance(model, OnnxModel):
        network, num_parameters = f"{model.settings.network}, onnxruntime", model.num_parameters
    per_stage = []
    if stages and has_stages(predictor):
        per_stage = predict_stages(predictor, records, truth, source.name)
    return Entry(
        source.name,
        detections,
        per_stage,
        num_parameters,
        speed,
        read_curve(source.folder),
        [("weights", source.weights or ""), ("network", network)],
    )


def check_names(
    source: Source, theirs: Sequence[str], ours: Sequence[str], rename_classes: bool
) -> None:
    """Refuse a model of other classes than those of the data.

    Raises:
        UserError: they differ; names alone may, where the user says that they are the same.
    """
    difference = class_difference(theirs, ours)
    if not difference:
        return
    line = f"model '{source.name}' was trained on {difference}"
    if len(theirs) != len(ours) or sorted(theirs) == sorted(ours):
        raise UserError(f"{line}; take the data set, or the model, that belong together")
    if not rename_classes:
        raise UserError(f"{line}; if these are the same classes, --rename-classes says so")


def saved_entry(source: Source, name: str, records: Sequence[dict], truth: GroundTruth) -> Entry:
    """Saved predictions, which are read and fitted to a data set.

    Args:
        source: with `results`.
        name: of the data set.
        records, truth: of it, see `load_truth`.
    """
    metadata = MetadataCatalog.get(name)
    names = metadata.get("thing_classes") or truth.class_names
    path = source.results or ""
    results = fit_results(read_results(path), records, dict(zip(names, truth.category_ids)), path)
    detections = to_detections(results, truth, path)
    return Entry(source.name, detections, facts=[("predictions", path)])


def read_curve(folder: str | None) -> list[dict]:
    """The lines of the `metrics.json` of a run; none without a run. Half-written ones are left
    out, as those of a training that goes on."""
    path = Path(folder or "", "metrics.json")
    if not folder or not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "iteration" in value:
            lines.append(value)
    return lines
