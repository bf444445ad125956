"""The page in a real browser: pictures, sliders, downloads, the webcam, and no other server."""

import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2ext.cli.predict import main as predict
from d2ext.config import projects
from d2ext.engine import Predictor
from d2ext.engine.exporting import export_model
from d2ext.engine.onnx_predictor import OnnxPredictor
from d2ext.inference.writers.coco import coco_results

from detectron2.data.detection_utils import read_image

from tests.export.helpers import save
from tests.report.browser import open_browser

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
COUNT = r"text=/^\d+ objects?$/"
JSON, PNG = "COCO results (JSON)", "picture (PNG)"


@pytest.fixture(scope="module", autouse=True)
def gradio():
    return pytest.importorskip("gradio", reason="gradio is not installed (make install brings it)")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """`checkpoint(name)` of a tiny network, with no keys of projects that only the tests import."""

    def make(name):
        projects.load_projects()
        installed = [x for x in projects.config_functions() if x.__module__.startswith("d2ext.")]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setattr(projects, "_CONFIG_FUNCTIONS", installed)
            return save(name, tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """A file of ONNX of HTC with its stages."""
    weights, path = checkpoint("htc"), str(tmp_path_factory.mktemp("exported") / "model.onnx")
    export_model(Predictor.from_weights(weights, device="cpu"), weights, path, all_stages=True)
    return path


@pytest.fixture(scope="module")
def browser():
    with open_browser(*FLAGS) as opened:
        yield opened


@pytest.fixture
def photo(few_images):
    return str(sorted((few_images / "images").iterdir())[0])


@pytest.fixture
def outside(monkeypatch):
    """Where this process connects to, and what it looks up, but for this machine."""
    found = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def note(host):
        if host not in ("127.0.0.1", "localhost", "::1"):
            found.append(host)

    def connecting(self, address):
        note(address[0] if isinstance(address, tuple) else "localhost")
        return connect(self, address)

    def looking_up(host, *args, **options):
        note(host)
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket.socket, "connect", connecting)
    monkeypatch.setattr(socket, "getaddrinfo", looking_up)
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextlib.contextmanager
def served(script, model):
    """The address of the page of a model."""
    page = script.launch(script.argument_parser().parse_args([model, "--port", free_port()]))
    try:
        yield page.local_url
    finally:
        page.close(verbose=False)


@contextlib.contextmanager
def opened(browser, address):
    """A page at an address, in which nothing goes wrong, and which asks for nothing elsewhere."""
    page, problems, requests = browser.new_page(), [], []
    page.set_default_timeout(120_000)
    page.on("console", lambda x: problems.append(x.text) if x.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    yield page
    page.close()
    assert problems == [] and len(requests) > 5
    assert [x for x in requests if not x.startswith((address, "data:", "blob:"))] == []


def upload(page, path):
    page.set_input_files("input[type=file]", path)
    page.wait_for_selector(COUNT)


def move(page, slider, value):
    """Give a slider a value, and wait for another number of objects."""
    before = page.inner_text(COUNT)
    box = page.get_by_label(f"number input for {slider}")
    box.fill(str(value))
    box.press("Enter")
    page.wait_for_function("(x) => !document.body.innerText.includes(x)", arg=f"\n{before}\n")


def download(page, button):
    """Name and bytes of a file."""
    with page.expect_download() as waiting:
        page.get_by_text(button).click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def test_threshold_and_stage_choose_among_what_was_found_once(
    script, exported, photo, browser, monkeypatch, outside
):
    own, image = OnnxPredictor(exported), read_image(photo, "BGR")
    stages = own.model.inference_stages([own.prepare(image)])
    wanted = [x[0]["instances"] for x in stages]
    calls, detect = [], script.detect
    monkeypatch.setattr(script, "detect", lambda *args: calls.append(args) or detect(*args))
    with served(script, exported) as address, opened(browser, address) as page:
        upload(page, photo)
        known = len(calls)
        for slider, value, instances, threshold in (
            (None, None, wanted[2], 0.5),
            ("lowest score", 0.6, wanted[2], 0.6),
            ("after stage", 1, wanted[0], 0.6),
        ):
            if slider:
                move(page, slider, value)
            kept = instances[instances.scores >= threshold]
            assert 0 < len(kept) < len(instances)
            assert page.inner_text(COUNT).split()[0] == str(len(kept))
            name, content = download(page, JSON)
            results = coco_results(kept, 1, Path(photo).name, own.class_names)
            assert (name, json.loads(content)) == ("predictions.json", results)
            name, content = download(page, PNG)
            assert name == f"{Path(photo).stem}.png"
            drawn = own.draw(image, instances, threshold)[:, :, ::-1]
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), drawn)
        assert len(calls) == known == 2  # an empty picture at the start, and this one
    assert outside == []


def test_a_webcam_takes_a_picture(script, exported, browser):
    with served(script, exported) as address, opened(browser, address) as page:
        page.get_by_label("Capture from camera").click()
        page.get_by_text("Click to Access Webcam").click()
        # Before the first frame, the button does nothing.
        page.wait_for_function("() => document.querySelector('video')?.videoWidth > 0")
        page.get_by_label("capture photo").click()
        page.wait_for_selector(COUNT)
        name, content = download(page, JSON)
        found = json.loads(content)
        assert str(len(found)) == page.inner_text(COUNT).split()[0]
        assert min(found[0]["segmentation"]["size"]) >= 240


def test_a_file_that_is_no_picture_is_told_and_what_was_there_goes(
    script, exported, photo, browser, tmp_path
):
    (tmp_path / "broken.png").write_bytes(Path(photo).read_bytes()[:200])
    with served(script, exported) as address, opened(browser, address) as page:
        upload(page, photo)
        page.get_by_label("Remove Image").click()
        page.wait_for_selector(COUNT, state="detached")
        page.set_input_files("input[type=file]", tmp_path / "broken.png")
        page.wait_for_selector("text=image 'broken.png' cannot be read: ")
        assert page.get_by_text(JSON).is_disabled() and not page.locator(COUNT).count()


def test_the_folder_of_a_training_has_a_page_until_ctrl_c(checkpoint, photo, browser, tmp_path):
    """A network without stages has no slider for them; the file is that of `d2ext predict`."""
    weights = checkpoint("mask_rcnn")
    command = [sys.executable, "-W", "ignore", str(ROOT / "demo/app.py"), str(Path(weights).parent)]
    process = subprocess.Popen(
        [*command, "--device", "cpu", "--port", free_port()],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        address = process.stdout.readline().split()[1]
        with opened(browser, address) as page:
            upload(page, photo)
            assert page.get_by_label("number input for lowest score").is_visible()
            assert not page.get_by_label("number input for after stage").count()
            move(page, "lowest score", 0)
            found = json.loads(download(page, JSON)[1])
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130
    model = ["--weights", weights, "--device", "cpu", "--confidence-threshold", "0"]
    assert predict([*model, "--input", photo, "--output", str(tmp_path)]) == 0
    wanted = json.loads((tmp_path / "predictions.json").read_text())
    assert found == [{**x, "file_name": Path(photo).name} for x in wanted] and found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no.onnx"], "no.onnx does not exist"),
        (["EXPORTED", "--port", "TAKEN"], "nothing can listen at 127.0.0.1, port "),
        (["EXPORTED", "--port", "70000"], "nothing can listen at 127.0.0.1, port 70000"),
        (["EXPORTED", "--device", "cuda"], "--device cuda has no effect on it; leave it out"),
    ],
)
def test_mistakes_are_one_line(script, exported, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        known = {"EXPORTED": exported, "TAKEN": str(taken.getsockname()[1])}
        assert script.main([known.get(word, word) for word in words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
