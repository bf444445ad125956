"""Files of results, one module per format.

A writer has `needs_image`, whether it looks at the pixels of images; `write(result)`, which gets
the `ImageResult` of every image in order; and `close()`, after the last one.
"""

from d2ext.inference.writers.build import FORMATS, Writer, build_writers

__all__ = ["FORMATS", "Writer", "build_writers"]
