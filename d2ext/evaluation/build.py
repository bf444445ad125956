"""One evaluator per data set."""

import os
from typing import Optional

from d2ext import compat
from d2ext.errors import UserError

from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator


def build_evaluator(dataset_name: str, output_dir: Optional[str] = None) -> DatasetEvaluator:
    """The evaluator that ``MetadataCatalog.get(dataset_name).evaluator_type`` asks for.

    Args:
        dataset_name: a registered data set.
        output_dir: results go to ``output_dir/inference/<dataset_name>``; ``None``: nowhere.

    Raises:
        UserError: there is no evaluator for such a data set.
    """
    kind = getattr(MetadataCatalog.get(dataset_name), "evaluator_type", None)
    folder = os.path.join(output_dir, "inference", dataset_name) if output_dir else None
    if kind in ("coco", "coco_panoptic_seg"):
        # The compiled COCO evaluation of detectron2 raises only after the whole inference when
        # its extension is absent, so it is requested only where it exists.
        return COCOEvaluator(
            dataset_name, output_dir=folder, use_fast_impl=compat.has_compiled_detectron2()
        )
    raise UserError(
        f"data set '{dataset_name}' has evaluator_type {kind!r}, for which there is no evaluator; "
        "known: 'coco', 'coco_panoptic_seg'"
    )
