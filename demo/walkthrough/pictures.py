"""The pictures of the report: ground truth and predictions on image files, and loss curves."""

import base64
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from d2ext.engine import Predictor
from d2ext.visualization import draw_ground_truth, draw_predictions, side_by_side

from detectron2.data.detection_utils import read_image

# One colour per network, readable on white and on black.
LINE_COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6")
_AXES_COLOR = "#8a93a0"


def choose_records(records: Sequence[dict], count: int) -> list[dict]:
    """Records spread evenly over those with three objects or more (all, if there are too few)."""
    good = [r for r in records if len(r.get("annotations", ())) >= 3]
    good = good if len(good) >= count else list(records)
    positions = np.linspace(0, len(good) - 1, min(count, len(good))).round().astype(int)
    return [good[i] for i in positions]


def data_uri(rgb: np.ndarray) -> str:
    """The picture as a JPEG inside an address, for self-contained pages."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=88, subsampling=0)
    return _uri("image/jpeg", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def ground_truth_pictures(records: Sequence[dict], metadata) -> list[str]:
    return [data_uri(draw_ground_truth(record, metadata)) for record in records]


def prediction_pictures(predictor: Predictor, records: Sequence[dict]) -> list[str]:
    """Predictions on the image files of the records, through the public predictor."""
    pictures = []
    for record in records:
        image = read_image(record["file_name"], "BGR")
        instances = predictor(image)["instances"]
        pictures.append(data_uri(draw_predictions(image[..., ::-1], instances, predictor.metadata)))
    return pictures


def stage_pictures(predictor: Predictor, records: Sequence[dict]) -> list[list[str]]:
    """For each record, a picture of the result after each stage."""
    rows = []
    for record in records:
        image = read_image(record["file_name"], "BGR")
        stages = predictor.model.inference_stages([predictor.prepare(image)])
        rows.append(
            [
                data_uri(draw_predictions(image[..., ::-1], o[0]["instances"], predictor.metadata))
                for o in stages
            ]
        )
    return rows


def overview(columns: dict[str, Sequence[str]], rows: int = 3) -> np.ndarray:
    """One picture of all networks: a row per image, a column per network.

    Args:
        columns: pictures as `data_uri` makes them, by the title above them.
        rows: how many of the pictures of each column.

    Returns:
        uint8 RGB array.
    """
    count = min(rows, *(len(pictures) for pictures in columns.values()))
    panels = [_from_uri(pictures[row]) for row in range(count) for pictures in columns.values()]
    titles = [*columns, *([""] * (len(panels) - len(columns)))]
    return side_by_side(panels, titles, columns=len(columns))


def _from_uri(uri: str) -> np.ndarray:
    content = base64.b64decode(uri.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def loss_chart(curves: dict[str, list[dict]]) -> str:
    """Total loss over iterations as an SVG in an address; raw values faint, their trend strong.

    Args:
        curves: lines of metrics.json by the title of the network.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(9.6, 3.6))
        axes = figure.add_subplot()
        for color, (title, curve) in zip(_cycle(LINE_COLORS), curves.items()):
            x = [record["iteration"] + 1 for record in curve]
            y = [record["total_loss"] for record in curve]
            axes.plot(x, y, color=color, alpha=0.28, linewidth=1)
            axes.plot(x, _trend(y), color=color, linewidth=2, label=title)
        axes.set_xlabel("iteration", color=_AXES_COLOR)
        axes.set_ylabel("total loss", color=_AXES_COLOR)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.grid(axis="y", color=_AXES_COLOR, alpha=0.25, linewidth=0.7)
        axes.tick_params(colors=_AXES_COLOR, length=0)
        axes.spines[:].set_visible(False)
        axes.legend(
            frameon=False,
            labelcolor=_AXES_COLOR,
            ncols=len(curves),
            loc="lower left",
            bbox_to_anchor=(0, 1),
        )
        figure.tight_layout()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _uri("image/svg+xml", buffer.getvalue())


def _cycle(colors: tuple[str, ...]):
    while True:
        yield from colors


def _trend(values: list[float], reach: int = 3) -> list[float]:
    """Mean over each value and up to `reach` neighbours on either side."""
    windows = [values[max(i - reach, 0) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
