#!/usr/bin/env python
"""A page that shows what a network finds in a picture, uploaded or of a webcam: with a threshold,
the stage of a cascade, and the result to download. It needs the package gradio."""

import argparse
import json
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2ext.cli.predict import stage_results
from d2ext.config import load_projects
from d2ext.engine import Predictor
from d2ext.engine.cli import run_guarded
from d2ext.engine.onnx_predictor import choose_engine
from d2ext.errors import UserError
from d2ext.evaluation.results import to_instances
from d2ext.inference.pixels import read_bgr
from d2ext.inference.writers.coco import coco_results
from d2ext.inference.writers.files import save_picture
from d2ext.report.running import has_stages
from d2ext.report.sources import Source, build_source_predictor, is_onnx, parse_source
from d2ext.visualization import draw_predictions

from detectron2.structures import Instances

_KEPT = 3600  # seconds: files on the server's disk that are older are deleted, once in as many
_EPILOG = """
examples:
  %(prog)s output/model.onnx
  %(prog)s output/my
  %(prog)s output/my/model_final.pth --device cuda --port 8000
"""


class Found(NamedTuple):
    """What a network finds in one picture.

    Attributes:
        name: of its file.
        rgb: uint8 (H, W, 3).
        stages: COCO results after each stage, the last those of the whole network; all that it
            gives, as `predictions.json` of `d2ext predict` has them.
    """

    name: str
    rgb: np.ndarray
    stages: list[list[dict]]


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a file of ONNX that d2ext export wrote (with --stages for the stages of a cascade), "
        "a checkpoint, the folder of a training, or CONFIG,WEIGHTS",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: the config's)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets other machines in (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    return parser


def import_gradio() -> Any:
    """The package gradio.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise UserError(
            f"the page needs the package {error.name}: pip install gradio, or "
            "pip install '.[gradio]' in a clone"
        ) from error
    return gradio


def find_model(text: str) -> Source:
    """The model that the user names.

    Raises:
        UserError: there is none, or it cannot predict on new pictures.
    """
    source = parse_source(text)
    path = source.weights or source.results or ""
    if not source.weights or path.endswith(".pt2"):
        raise UserError(
            f"{path} cannot be shown; give a file of ONNX that d2ext export wrote, a checkpoint, "
            "or the folder of a training"
        )
    return source


def load_model(source: Source, device: str | None = None) -> Predictor:
    """The predictor of a model.

    Raises:
        UserError: see `Predictor`.
    """
    load_projects()
    if device and is_onnx(source):
        choose_engine(source.weights, unused=[f"--device {device}"])
    return build_source_predictor(source, device=device)


def detect(predictor: Predictor, image: np.ndarray) -> list[Instances]:
    """Instances in a BGR image after each stage, the last of them those of the whole network."""
    if has_stages(predictor):
        return stage_results(predictor, image)
    return [predictor(image)["instances"].to("cpu")]


def find(predictor: Predictor, path: str) -> Found:
    """What is in the picture of a file.

    Raises:
        UserError: it cannot be read.
    """
    name = os.path.basename(path)
    image = read_bgr(path, name)
    stages = [coco_results(x, 1, name, predictor.class_names) for x in detect(predictor, image)]
    return Found(name, image[:, :, ::-1], stages)


def write(found: Found, results: list[dict], predictor: Predictor, folder: str) -> tuple[str, str]:
    """Write `predictions.json` and the picture that shows it; their paths."""
    names = Path(folder, "predictions.json"), Path(folder, f"{Path(found.name).stem}.png")
    names[0].write_text(json.dumps(results), encoding="utf-8")
    classes = {label: label for label in range(len(predictor.class_names))}
    instances = to_instances(results, found.rgb.shape[:2], classes)
    save_picture(draw_predictions(found.rgb, instances, predictor.metadata, 0.0), names[1])
    return str(names[0]), str(names[1])


def build_page(predictor: Predictor, title: str) -> Any:
    """The page of a network, a `gradio.Blocks`."""
    gr = import_gradio()
    # Networks say in different ways how many stages they have; all of them count for a picture.
    stages = len(detect(predictor, np.zeros((64, 64, 3), np.uint8)))

    def look(path: str | None) -> Found | None:
        try:
            return None if path is None else find(predictor, path)
        except UserError as error:
            gr.Warning(str(error), duration=None)
            return None

    def show(found: Found | None, threshold: float, stage: float) -> Iterator[tuple]:
        if found is None:
            empty = gr.DownloadButton(value=None, interactive=False)
            yield None, "", empty, empty
            return
        results = [x for x in found.stages[int(stage) - 1] if x["score"] >= threshold]
        # Gradio copies the files before it comes back for more.
        with tempfile.TemporaryDirectory() as folder:
            table, picture = write(found, results, predictor, folder)
            text = f"{len(results)} object{'' if len(results) == 1 else 's'}"
            files = [gr.DownloadButton(value=path, interactive=True) for path in (table, picture)]
            yield picture, text, *files

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(_KEPT, _KEPT)) as page:
        state = gr.State()
        gr.Markdown(f"# {title}")
        with gr.Row():
            with gr.Column():
                photo = gr.Image(label="picture", sources=["upload", "webcam"])
                # The file as it came: `read_bgr` says what is wrong with it.
                photo.preprocess = lambda payload: payload and payload.path
                threshold = gr.Slider(0, 1, 0.5, step=0.01, label="lowest score")
                stage = gr.Slider(
                    1, max(stages, 2), stages, step=1, label="after stage", visible=stages > 1
                )
            with gr.Column():
                picture = gr.Image(label="found", interactive=False, buttons=["fullscreen"])
                text = gr.Markdown()
                with gr.Row():
                    files = [
                        gr.DownloadButton(label, interactive=False)
                        for label in ("COCO results (JSON)", "picture (PNG)")
                    ]
        shown = {"fn": show, "inputs": [state, threshold, stage]}
        shown |= {"outputs": [picture, text, *files], "api_visibility": "private"}
        photo.change(look, photo, state, api_visibility="private").then(**shown)
        for slider in (threshold, stage):
            slider.change(**shown, trigger_mode="always_last", show_progress="hidden")
    return page


def launch(args: argparse.Namespace) -> Any:
    """Serve the page from another thread; it, as a `gradio.Blocks`.

    Raises:
        UserError: gradio is missing, the model cannot be used, or nothing can listen there.
    """
    source, gr = find_model(args.model), import_gradio()
    page = build_page(load_model(source, args.device), source.name)
    try:
        page.launch(
            server_name=args.host, server_port=args.port, share=False, inbrowser=False,
            ssr_mode=False, prevent_thread_lock=True, quiet=True, footer_links=[],
            # Fonts of the reader's machine.
            theme=gr.themes.Default(font=["sans-serif"], font_mono=["monospace"]),
        )  # fmt: skip
    except (OSError, OverflowError) as error:
        raise UserError(
            f"nothing can listen at {args.host}, port {args.port}; choose others by --host and "
            "--port"
        ) from error
    print(f"{source.name}: {page.local_url} (Ctrl-C ends it)", flush=True)
    return page


def run(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    page = launch(args)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def main(argv: list[str] | None = None) -> int:
    """Command line; 1 for a mistake of the user."""
    args = argument_parser().parse_args(argv)
    warnings.filterwarnings("ignore", "torch.meshgrid")  # of detectron2's anchors, harmless
    return run_guarded(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
