"""A Parquet file with a row per image, see `d2ext.inference.table`."""

import contextlib
import os
from typing import Any

from d2ext.data.json_files import writing
from d2ext.inference import table
from d2ext.inference.results import ImageResult

_GROUP = 500  # rows that are written together


class ParquetWriter:
    """`predictions.parquet`."""

    needs_image = False

    def __init__(self, folder: str, names: list[str], ids: list[int]):
        self._pyarrow: Any = table.require_pyarrow()
        self._names, self._ids, self._rows = names, ids, []
        self._stack = contextlib.ExitStack()
        file = self._stack.enter_context(writing(os.path.join(folder, "predictions.parquet"), "wb"))
        self._file = self._stack.enter_context(
            self._pyarrow.parquet.ParquetWriter(file, table.schema(), compression="zstd")
        )

    def write(self, result: ImageResult) -> None:
        record, found = result.record, result.detections
        entries = table.detections_of(found, self._names, self._ids)
        self._rows.append(table.row(record.image_id, record.name, found.size, entries))
        if len(self._rows) >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        rows = self._pyarrow.Table.from_pylist(self._rows, schema=table.schema())
        self._file.write_table(rows)
        self._rows = []

    def close(self) -> None:
        self._flush()
        self._stack.close()
