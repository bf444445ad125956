"""Evaluators of instance segmentation: they keep what a model finds and measure it at the end."""

import itertools
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence

from tabulate import tabulate

from d2ext.errors import UserError
from d2ext.evaluation.bootstrap import MOST_IMAGES, bootstrap_interval
from d2ext.evaluation.coco_scores import (
    class_rows,
    coco_metrics,
    default_implementation,
    evaluate_coco,
)
from d2ext.evaluation.ground_truth import by_image, load_ground_truth
from d2ext.evaluation.mapr import evaluate_mapr, mapr_metrics
from d2ext.evaluation.predictions import ImageDetections, collect, write_results

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

METRICS = ("coco", "boundary", "voc_sds")
logger = logging.getLogger(__name__)


class InstanceEvaluator(DatasetEvaluator):
    """Measures detections with masks on a data set with COCO-format annotations.

    Metrics by name: `"coco"` is COCO's AP and AR of boxes and masks (tasks `bbox` and `segm`),
    `"boundary"` the same with boundary IoU (task `boundary`), `"voc_sds"` mAP^r (task
    `voc_sds`). Where nothing was found that was to be found the values are 0; nan means that there
    was nothing to be found.
    """

    def __init__(
        self,
        dataset_name: str,
        metrics: Sequence[str] = ("coco",),
        output_dir: str | None = None,
        *,
        mapr_ious: Sequence[float] = (0.5, 0.7),
        mapr_area: bool = False,
        max_detections: int = 100,
        distributed: bool = True,
    ):
        """
        Args:
            dataset_name: a registered data set.
            metrics: what to measure.
            output_dir: `coco_instances_results.json` and tables go there; None: nowhere.
            mapr_ious: thresholds of mAP^r, beside those of mAP^r_vol.
            mapr_area: mAP^r by the area under the curve instead of eleven points.
            max_detections: what the model finds in an image at most, negative for no limit; COCO's
                metrics count 100 of each class, or as many as this if it is more.
            distributed: gather the detections of all processes in the main one.

        Raises:
            UserError: an unknown metric, a threshold outside of (0, 1], unreadable annotations.
        """
        unknown = [m for m in metrics if m not in METRICS]
        if unknown:
            raise UserError(f"unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}")
        if not all(0 < float(iou) <= 1 for iou in mapr_ious):
            raise UserError(f"IoU thresholds of mAP^r are in (0, 1], not {list(mapr_ious)}")
        self.dataset_name = dataset_name
        self.metrics = tuple(metrics)
        self.output_dir = output_dir
        self.mapr_ious = tuple(float(iou) for iou in mapr_ious)
        self.mapr_area = mapr_area
        self.max_detections = max_detections
        self.distributed = distributed
        self.truth = None
        if comm.is_main_process() or not distributed:
            self.truth = load_ground_truth(dataset_name)
        self.reset()

    def reset(self) -> None:
        """Forget all detections."""
        self._found: dict[object, ImageDetections] = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Keep the `"instances"` of a batch.

        Args:
            inputs: records with `image_id`.
            outputs: of the model, in the same order.

        Raises:
            UserError: the model gives no instances, or broken ones.
        """
        for record, output in zip(inputs, outputs):
            if "instances" not in output:
                raise UserError(
                    f"the model's outputs have {sorted(output)} but no 'instances', "
                    "which the evaluation of instance segmentation needs"
                )
            image_id = record["image_id"]
            self._found[image_id] = collect(output["instances"], image_id)

    def _gather(self) -> list[ImageDetections] | None:
        """Detections of all processes, one entry per image; None in all but the main process."""
        found = list(self._found.values())
        if self.distributed and comm.get_world_size() > 1:
            comm.synchronize()
            found = list(itertools.chain(*comm.gather(found, dst=0)))
            if not comm.is_main_process():
                return None
        return list({image.image_id: image for image in found}.values())

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Results `{task: {metric: percent}}`; `{}` in all but the main process."""
        found = self._gather()
        if found is None:
            return {}
        if self.truth is None:
            self._write(found)
            logger.info("%s has no annotations: results are written only", self.dataset_name)
            return {}
        detections = by_image(self.truth, found)
        self._write(found)
        if not any(len(image.scores) for image in found):
            logger.warning("No predictions from the model for %s", self.dataset_name)
        with_masks = any(image.masks is not None for image in found)
        if not with_masks and any(len(image.scores) for image in found):
            for metric in {"boundary", "voc_sds"} & set(self.metrics):
                raise UserError(f"metric {metric!r} needs masks, but the model gives boxes only")
        results = OrderedDict()
        if "coco" in self.metrics:
            for kind in ("bbox", "segm") if with_masks else ("bbox",):
                results[kind] = self._coco(detections, kind)
        if "boundary" in self.metrics:
            results["boundary"] = self._coco(detections, "boundary")
        if "voc_sds" in self.metrics:
            results["voc_sds"] = self._mapr(detections)
        return results

    def _write(self, found):
        if not self.output_dir:
            return
        os.makedirs(self.output_dir, exist_ok=True)
        metadata = MetadataCatalog.get(self.dataset_name)
        mapping = metadata.get("thing_dataset_id_to_contiguous_id")
        if self.truth is not None:
            category_ids = self.truth.category_ids
        elif mapping:
            category_ids = sorted(mapping, key=mapping.get)
        else:
            category_ids = range(len(metadata.thing_classes))
        write_results(
            found, category_ids, os.path.join(self.output_dir, "coco_instances_results.json")
        )

    def _coco(self, detections, kind):
        tables = evaluate_coco(self.truth, detections, kind, max_detections=self.max_detections)
        metrics = coco_metrics(tables, self.truth.class_names)
        headers = ["class", "AP", "AP50", "AP75", "APs", "APm", "APl", f"AR@{tables.limits[-1]}"]
        rows = class_rows(tables, self.truth.class_names)
        rows.append(["all", *(metrics[name] for name in headers[1:])])
        self._show(kind, headers, rows, f" ({default_implementation()})")
        if 1 < len(self.truth.images) <= MOST_IMAGES:
            low, high = bootstrap_interval(self.truth, detections, kind, self.max_detections)
            logger.info(
                "%s AP %.1f; with other %d images it would be %.1f to %.1f (95%%, bootstrap)",
                kind, metrics["AP"], len(self.truth.images), low, high,
            )  # fmt: skip
        return metrics

    def _mapr(self, detections):
        result = evaluate_mapr(self.truth, detections, self.mapr_ious, self.mapr_area)
        rows = [[name, *row] for name, row in zip(result.class_names, 100 * result.table)]
        rows.append(["all", *(100 * result.mean(iou) for iou in result.ious)])
        points = "area under the curve" if self.mapr_area else "eleven points"
        headers = ["class", *(f"{iou:g}" for iou in result.ious)]
        self._show("voc_sds", headers, rows, f": AP^r at IoU, {points}")
        return mapr_metrics(result, self.mapr_ious, self.mapr_area)

    def _show(self, task, headers, rows, remark):
        """Log a table of percentages and write it beside the detections."""
        table = tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".2f")
        logger.info("%s of %s%s\n%s", task, self.dataset_name, remark, table)
        if self.output_dir:
            path = os.path.join(self.output_dir, f"{task}_by_class.json")
            by_class = {row[0]: dict(zip(headers[1:], row[1:])) for row in rows}
            with open(path, "w", encoding="utf-8") as f:
                json.dump(by_class, f, indent=1)


class VOCSDSEvaluator(InstanceEvaluator):
    """mAP^r, the metric of MNC and FCIS: `voc_sds/mAPr@0.5`, `mAPr@0.7` and `mAPr_vol`.

    Works on every data set with COCO-format annotations. Crowd regions are no objects there: a
    detection that is no hit and lies in one is not counted.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        ious: Sequence[float] = (0.5, 0.7),
        area: bool = False,
        distributed: bool = True,
    ):
        """
        Args:
            dataset_name: a registered data set.
            output_dir: results go there; None: nowhere.
            ious: thresholds in (0, 1].
            area: area under the curve instead of eleven points.
            distributed: gather the detections of all processes in the main one.
        """
        super().__init__(
            dataset_name,
            ("voc_sds",),
            output_dir,
            mapr_ious=ious,
            mapr_area=area,
            distributed=distributed,
        )
