"""The data check: annotations, image files and semantic maps of a data set, in one report.

Before a training it reads image headers only, and recalls its last result if that was without an
error and no file has changed since.
"""

import logging
import os
import time
from collections.abc import Sequence

from d2ext.data.catalog import check_registered, semantic_map_path
from d2ext.data.check import cache
from d2ext.data.check.coco_file import coco_summary
from d2ext.data.check.images import ImageFile, file_findings
from d2ext.data.check.problems import Problem, Report
from d2ext.errors import UserError

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)

TABLE_FILE = "data_check.txt"
# Data sets of these kinds are made of a COCO instances file; others (LVIS, ...) have another form.
_COCO_KINDS = ("coco", "coco_panoptic_seg", "voc_sds")


def check_files(
    name: str,
    json_file: str,
    image_root: str,
    sem_seg_root: str | None = None,
    *,
    evaluated: bool = False,
    thorough: bool = False,
    map_hint: str = "",
) -> Report:
    """Check a COCO instances file with its images and maps.

    Args:
        name: shown in the report.
        json_file, image_root, sem_seg_root: as for `register_coco_dataset`.
        evaluated: whether the set is evaluated on, which needs more of the annotations.
        thorough: decode every image and map, without looking for an earlier result.
        map_hint: where to get missing maps from.

    Raises:
        UserError: the file is no COCO instances file at all.
    """
    report = Report(name, json_file)
    summary = coco_summary(PathManager.get_local_path(json_file))
    report.add(summary.problems, evaluated)
    for folder, what in ((image_root, "image"), (sem_seg_root, "semantic map")):
        if folder and not os.path.isdir(folder):
            text = f"{what} folder {folder} does not exist"
            text += f"; {map_hint}" if map_hint and what != "image" else ""
            report.add([Problem("error", "folder", text)], evaluated)
            if what == "image":
                return report
            sem_seg_root = None
    folders = sorted({os.path.dirname(name) for name, _, _ in summary.images})
    folders = [os.path.join(image_root, folder) for folder in folders]
    folders += [sem_seg_root] if sem_seg_root else []
    key = ["images", cache.fingerprint([json_file, *folders]), bool(sem_seg_root)]
    stored = None if thorough else cache.load(key)
    if stored is not None:
        report.add([Problem(*p) for p in stored], evaluated)
        return report
    started = time.perf_counter()
    problems = _check_images(summary.images, image_root, sem_seg_root, thorough)
    report.add(problems, evaluated)
    sound = all(p.severity == "warning" for p in problems)
    if sound and time.perf_counter() - started > cache.SLOW and not thorough:
        cache.store(key, problems)
    return report


def _check_images(images, image_root, sem_seg_root, thorough) -> list[Problem]:
    files = [
        ImageFile(
            os.path.join(image_root, name),
            width,
            height,
            semantic_map_path(sem_seg_root, name) if sem_seg_root else None,
        )
        for name, width, height in images
    ]
    found = [Problem(*f, images[i][0]) for i, f in file_findings(files, thorough)]
    return found + _shared_maps(images, files)


def _shared_maps(images, files) -> list[Problem]:
    """Maps are named by the stem of an image, which may be that of another image as well."""
    first: dict[str, str] = {}
    found = []
    for (name, _, _), file in zip(images, files):
        if file.map_path:
            other = first.setdefault(file.map_path, name)
            if os.path.normpath(other) != os.path.normpath(name):
                text = f"has the semantic map {file.map_path}, which is also that of {other}; "
                text += "rename one of the images"
                found.append(Problem("error", "map-shared", text, name))
    return found


def _image_files(name) -> dict[str, str]:
    """Names by real path, of the images of a registered data set."""
    metadata = MetadataCatalog.get(name)
    images = coco_summary(PathManager.get_local_path(metadata.json_file)).images
    root = os.path.realpath(metadata.image_root)
    return {os.path.normpath(os.path.join(root, file)): file for file, _, _ in images}


def _shared_images(name, train_sets) -> list[Problem]:
    """Images of a test set that are trained on."""
    found = []
    own = _image_files(name)
    for other in train_sets:
        shared = sorted(own.keys() & _image_files(other).keys())
        if shared:
            text = f"{len(shared)} of {len(own)} images are in the training set {other!r} too "
            text += f"(e.g. {own[shared[0]]}); results on them say little"
            found.append(Problem("warning", "trained-on", text))
    return found


def _has_coco_file(name) -> bool:
    metadata = MetadataCatalog.get(name)
    paths = metadata.get("json_file") and metadata.get("image_root")
    return bool(paths) and metadata.get("evaluator_type") in _COCO_KINDS


def check_dataset(
    name: str, *, evaluated: bool = False, semantic: bool = True, thorough: bool = False
) -> Report:
    """Check a registered data set; see `check_files`.

    Args:
        semantic: look at its semantic maps, if it has any.

    Returns:
        Report: empty for a data set that is not made of a COCO instances file.

    Raises:
        UserError: unknown name, files missing.
    """
    check_registered(name)
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if not _has_coco_file(name):
        logger.info("Data set %s is not checked: it has no COCO instances file", name)
        return Report(name, "no COCO instances file")
    if "://" not in json_file and not os.path.isfile(json_file):
        try:
            DatasetCatalog.get(name)  # generates it, or says what is missing
        except FileNotFoundError as e:
            raise UserError(
                f"data set {name!r}: {e.filename} does not exist; "
                "put it there or set DETECTRON2_DATASETS"
            ) from e
    return check_files(
        name,
        json_file,
        image_root,
        metadata.get("sem_seg_root") if semantic else None,
        evaluated=evaluated,
        thorough=thorough,
        map_hint=metadata.get("sem_seg_hint", ""),
    )


def check_before_training(
    train_sets: Sequence[str],
    test_sets: Sequence[str] = (),
    *,
    semantic: bool = True,
    output_dir: str | None = None,
) -> None:
    """Check all data sets of a training. Problems are logged as a table, shortened; the whole table
    goes to `data_check.txt` in the output folder.

    Args:
        train_sets, test_sets: registered names.
        semantic: whether the training reads semantic maps.
        output_dir: an existing folder, or None.

    Raises:
        UserError: there is an error in one of them.
    """
    reports = []
    checked = [n for n in dict.fromkeys(train_sets) if _has_coco_file(n)]
    for name in dict.fromkeys([*train_sets, *test_sets]):
        started = time.perf_counter()
        use_maps = semantic and name in train_sets
        report = check_dataset(name, evaluated=name in test_sets, semantic=use_maps)
        if name in test_sets and name not in train_sets and _has_coco_file(name):
            report.add(_shared_images(name, checked), evaluated=True)
        spent = time.perf_counter() - started
        logger.info("Data check of %s: %s (%.1f s)", name, report.summary(), spent)
        if report.problems:
            level = logging.ERROR if report.of("error") else logging.WARNING
            logger.log(level, "%s", report.table())
            reports.append(report)
    place = _write_tables(reports, output_dir)
    for report in reports:
        report.raise_errors(f"{place}mend the data or add --no-data-check")


def _write_tables(reports, output_dir) -> str:
    """Words that say where the whole tables are; removes those of an earlier run."""
    if not output_dir:
        return ""
    path = os.path.join(output_dir, TABLE_FILE)
    if not reports:
        if os.path.isfile(path):
            os.unlink(path)
        return ""
    with open(path, "w", encoding="utf-8") as f:
        f.write("\n\n".join(report.table(rows_per_kind=0) for report in reports) + "\n")
    return f"all of them are in {path}; "
