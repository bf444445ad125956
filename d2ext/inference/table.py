"""Predictions as Parquet: a row for every image, also for those that could not be predicted, with
its detections as a list. The columns are those of `schema`."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from d2ext.errors import UserError
from d2ext.evaluation.predictions import ImageDetections, to_coco
from d2ext.inference.storage import open_binary


def require_pyarrow() -> ModuleType:
    """pyarrow with its Parquet part, or a `UserError` that says how to get it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "tables of predictions (.parquet) need the package pyarrow: pip install pyarrow, or "
            "pip install '.[predict]' in the repository"
        ) from error
    return pyarrow


def schema() -> Any:
    """pyarrow's schema: `image_id`, `file_name`, `height`, `width`, `error` (null: predicted) and
    `detections`, a list of `category_id`, `category`, `score`, `mask_score` (null: as `score`),
    `bbox` (x, y, width, height) and `segmentation` (COCO's run-length code for the height and width
    of the image; null: a model without masks)."""
    pa = require_pyarrow()
    detection = pa.struct(
        [
            ("category_id", pa.int64()),
            ("category", pa.string()),
            ("score", pa.float64()),
            ("mask_score", pa.float64()),
            ("bbox", pa.list_(pa.float64())),
            ("segmentation", pa.string()),
        ]
    )
    return pa.schema(
        [
            ("image_id", pa.int64()),
            ("file_name", pa.string()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("error", pa.string()),
            ("detections", pa.list_(detection)),
        ]
    )


def detections_of(
    detections: ImageDetections, names: Sequence[str], ids: Sequence[int]
) -> list[dict]:
    """Detections of one image as rows have them.

    Args:
        names, ids: of the categories, by contiguous class.
    """
    found = []
    labels = detections.classes.tolist()
    for label, entry in zip(labels, to_coco(detections, 0, ids, text=True)):
        code = entry.get("segmentation")
        found.append(
            {
                "category_id": entry["category_id"],
                "category": names[label],
                "score": entry["score"],
                "mask_score": entry.get("mask_score"),
                "bbox": entry["bbox"],
                "segmentation": None if code is None else code["counts"],
            }
        )
    return found


def row(
    image_id: int, name: str, size: tuple[int, int] | None, detections: list[dict], error=None
) -> dict[str, Any]:
    """A row of the table; `size` is (height, width)."""
    height, width = size or (None, None)
    known = {"image_id": image_id, "file_name": name, "height": height, "width": width}
    return {**known, "error": error, "detections": detections if error is None else None}


def to_parquet(rows: Sequence[dict], notes: dict[str, str]) -> bytes:
    """A file with these rows, and with notes that `read_notes` finds."""
    pa = require_pyarrow()
    table = pa.Table.from_pylist(list(rows), schema=schema().with_metadata(notes))
    buffer = io.BytesIO()
    pa.parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


@contextlib.contextmanager
def _reading(place: str) -> Iterator[Any]:
    pa = require_pyarrow()
    try:
        with open_binary(place) as f:
            yield pa.parquet.ParquetFile(f)
    except (pa.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{place} is no whole Parquet file: {reason}") from error


def read_notes(place: str) -> dict[str, str]:
    """Notes of a file, and under `rows` how many it has.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    with _reading(place) as file:
        known = file.schema_arrow.metadata or {}
        notes = {key.decode(): value.decode() for key, value in known.items()}
        return {**notes, "rows": str(file.metadata.num_rows)}


def read_rows(place: str) -> list[dict]:
    """All rows of a file.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    with _reading(place) as file:
        return file.read().to_pylist()
