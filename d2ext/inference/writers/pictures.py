"""What is found, drawn over the image: a picture each, or a video of all."""

import os
from typing import Any

import cv2
import numpy as np

from d2ext.errors import UserError
from d2ext.inference.results import ImageResult
from d2ext.inference.writers.files import save_picture
from d2ext.visualization import draw_predictions


class PictureWriter:
    """`IMAGE.png`; small images are enlarged, so that names can be read."""

    needs_image = True

    def __init__(self, folder: str, metadata: Any):
        self._folder, self._metadata = folder, metadata

    def write(self, result: ImageResult) -> None:
        assert result.image is not None, "it needs images"
        drawn = draw_predictions(result.image[:, :, ::-1], result.instances, self._metadata, 0)
        save_picture(drawn, os.path.join(self._folder, f"{result.stem}.png"))

    def close(self) -> None:
        pass


class VideoWriter:
    """`predictions.mp4`, of the size of the first image; others are shrunk to fit, on black."""

    needs_image = True

    def __init__(self, folder: str, metadata: Any, frame_rate: float):
        self._path = os.path.join(folder, "predictions.mp4")
        self._metadata, self._rate = metadata, frame_rate or 2.0
        self._video: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def write(self, result: ImageResult) -> None:
        assert result.image is not None, "it needs images"
        rgb = result.image[:, :, ::-1]
        drawn = draw_predictions(rgb, result.instances, self._metadata, 0, 1.0)
        if self._video is None:
            height, width = (side + side % 2 for side in drawn.shape[:2])  # codecs need even sides
            self._size = (width, height)
            code = cv2.VideoWriter.fourcc(*"mp4v")
            self._video = cv2.VideoWriter(self._path, code, self._rate, self._size)
            if not self._video.isOpened():
                raise UserError(f"cannot write {self._path}: this OpenCV has no encoder for it")
        self._video.write(_fitted(drawn[:, :, ::-1], self._size))

    def close(self) -> None:
        if self._video is not None:
            self._video.release()


def _fitted(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    width, height = size
    scale = min(width / image.shape[1], height / image.shape[0], 1.0)
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    frame = np.zeros((height, width, 3), np.uint8)
    part = image[:height, :width]
    frame[: part.shape[0], : part.shape[1]] = part
    return frame
