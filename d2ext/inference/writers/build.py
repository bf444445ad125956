"""The formats by name."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from d2ext.inference.results import ImageResult, category_ids
from d2ext.inference.sources import Source
from d2ext.inference.writers.coco import CocoWriter, ResultsWriter
from d2ext.inference.writers.files import CropWriter, MaskWriter
from d2ext.inference.writers.labelme import LabelmeWriter
from d2ext.inference.writers.parquet import ParquetWriter
from d2ext.inference.writers.pictures import PictureWriter, VideoWriter
from d2ext.inference.writers.yolo import YoloWriter

FORMATS = {
    "pictures": "IMAGE.png with what was found",
    "results": "predictions.json, COCO results with names of files and classes",
    "coco": "coco.json, an instances file with run-length codes",
    "coco-polygons": "coco_polygons.json, the same with polygons",
    "yolo": "yolo/, a data set",
    "labelme": "labelme/IMAGE.json",
    "masks": "masks/IMAGE/CLASS_NUMBER.png",
    "parquet": "predictions.parquet",
    "crops": "crops/IMAGE_NUMBER_CLASS.png",
    "video": "predictions.mp4",
}


class Writer(Protocol):
    """See `d2ext.inference.writers`."""

    needs_image: bool

    def write(self, result: ImageResult) -> None: ...

    def close(self) -> None: ...


def build_writers(
    formats: Sequence[str], folder: str, names: list[str], metadata: Any, source: Source
) -> list[Writer]:
    """A writer for each format.

    Args:
        formats: keys of `FORMATS`.
        folder: which exists; files of earlier calls in it are replaced.
        names: of the classes.
        metadata: detectron2's, for pictures.
        source: whose COCO categories are used if they have the same names.

    Raises:
        UserError: a package is missing, or a file cannot be written.
    """
    ids = category_ids(names, source.categories)
    makers: dict[str, Callable[[], Writer]] = {
        "pictures": lambda: PictureWriter(folder, metadata),
        "results": lambda: ResultsWriter(folder, names),
        "coco": lambda: CocoWriter(folder, names, ids),
        "coco-polygons": lambda: CocoWriter(folder, names, ids, polygons=True),
        "yolo": lambda: YoloWriter(folder, names),
        "labelme": lambda: LabelmeWriter(folder, names),
        "masks": lambda: MaskWriter(folder, names),
        "parquet": lambda: ParquetWriter(folder, names, ids),
        "crops": lambda: CropWriter(folder, names),
        "video": lambda: VideoWriter(folder, metadata, source.frame_rate),
    }
    return [makers[name]() for name in dict.fromkeys(formats)]
