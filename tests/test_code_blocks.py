"""Every shell and Python block of the pages runs, in the order of its page, or a comment above it
says why not: `<!-- not run: REASON -->`.

Trainings are made short and images small, and the built-in sets have a few images; what is checked
is that nothing fails. Each page has a process and a folder of its own.
"""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest

from d2ext.config import find_config

from tests.reader import lay_out
from tests.test_readme import PAGES, read

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?"
    r"```(?P<language>bash|python|yaml)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# Commands of other pages that those of a page build on.
MADE_BEFORE = {
    "docs/configs.md": [
        "d2ext convert labelme mydata/photos --output mydata/my.json",
        "d2ext split mydata/my.json --images mydata/photos --output mydata/split "
        "--shares 0.7 0.3 0",
        "d2ext train htc_tiny.py OUTPUT_DIR=output/run1",
    ],
    "docs/evaluation.md": [
        f"d2ext train htc_tiny.py OUTPUT_DIR=output/run{number}" for number in (1, 2)
    ],
    "docs/prediction.md": ["d2ext train mask_rcnn_tiny --data shapes OUTPUT_DIR=output/run1"],
    "docs/checkpoints.md": ["d2ext train htc_tiny.yaml OUTPUT_DIR=output/htc_tiny"],
}
SIZES = {
    ".yaml": ["INPUT.MIN_SIZE_TRAIN=(64,)", "INPUT.MIN_SIZE_TEST=64", "MODEL.DEVICE=cpu"],
    ".py": [
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
        "train.device=cpu",
    ],
}
RUN = """
import importlib, json, runpy, sys, time
from pathlib import Path
from d2ext.cli.main import main as d2ext
from d2ext.engine import twins
for name in sys.argv[2:]:  # packages of the examples, which are not installed
    importlib.import_module(name)
def run(step):
    if isinstance(step, str):
        exec(compile(step, "block", "exec"), {"__name__": "__main__"})
        return 0
    program, *words = step
    sys.argv = [program, *words]
    try:
        if program == "d2ext":
            return d2ext(words)
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        return end.code
for step in json.loads(Path(sys.argv[1]).read_text()):
    with twins.few_images("datasets"):  # as in a process of its own: names are known afterwards
        code = run(step)
    if code:
        sys.exit(f"{step} ended with {code}")
    print(f"{time.process_time():.0f} s", step, flush=True)
"""


def blocks(page):
    """(language, text, reason or None) of the blocks of a page."""
    return [(m["language"], m["text"], m["reason"]) for m in _BLOCK.finditer(read(page))]


def short(text):
    """Fewer iterations: 20 become 1, twice as many one more."""

    def fewer(match):
        return f"{match[1]}{max(1, int(math.log2(int(match[2]) / 10)))}"

    text = re.sub(r"((?:MAX_ITER|max_iter)(?: ?= ?|: ))(\d+)", fewer, text)
    return re.sub(r"epochs=\d+", "epochs=1", text)


def config_of(words):
    """Name and suffix of the config that a command trains or evaluates."""
    if "--config-file" in words:
        name = words[words.index("--config-file") + 1]
    else:
        name = next(w for w in words[2:] if not w.startswith("-"))
    suffix = Path(name).suffix or Path(find_config(name)).suffix
    return name, suffix


def shortened(words):
    """A command, with words that make it short."""
    words = [short(word) for word in words]
    trains = words[0].endswith("train_net.py") or words[:2] == ["d2ext", "train"]
    if not trains and "--eval-only" not in words:
        return words
    config, suffix = config_of(words)
    words += SIZES[suffix]
    if "_finetune" in config:
        return [*words, "--epochs", "1", "--image-size", "64", "--batch-size", "2"]
    if not any(word.startswith(("SOLVER.MAX_ITER", "train.max_iter")) for word in words):
        words += [] if config.startswith("my_") else ["SOLVER.MAX_ITER=1"]
    return [*words, "SOLVER.IMS_PER_BATCH=2"]


def steps(page):
    """What of a page is run: texts of Python, and lists of the words of a command."""
    found = []
    for language, text, reason in blocks(page):
        if reason or language == "yaml":
            continue
        if language == "python":
            found.append(short(text))
            continue
        lines = text.replace("\\\n", " ").splitlines()
        commands = [shlex.split(line, comments=True) for line in lines]
        for words in filter(None, commands):
            assert words[0] in ("python", "d2ext"), f"{page}: say why {words[0]} is not run"
            found.append(shortened(words[1:] if words[0] == "python" else words))
    return found


def own_configs(page):
    """Name -> text of the configs that a page tells to write."""
    if page != "docs/configs.md":
        return {}
    found = {"yaml": "my_htc.yaml", "python": "my_htc.py"}
    return {
        found[language]: short(text)
        for language, text, _ in blocks(page)
        if language in found and "output/my_htc" in text
    }


WITH_STEPS = [page for page in PAGES if steps(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_STEPS)
def test_blocks_of_a_page_run_in_order(page, tmp_path, few_images, run_python):
    lay_out(tmp_path, few_images)
    for name, text in own_configs(page).items():
        (tmp_path / name).write_text(text)
    before = [shortened(line.split()) for line in MADE_BEFORE.get(page, ())]
    todo = [*before, *steps(page)]
    (tmp_path / "steps.json").write_text(json.dumps(todo))
    environment = {"DETECTRON2_DATASETS": str(tmp_path / "datasets")}
    packages = [p.parent for p in sorted(ROOT.glob("examples/*/*/__init__.py"))]
    packages = [p for p in packages if p.name != "tests"]
    command = ["-W", "ignore", "-c", RUN, "steps.json", *(p.name for p in packages)]
    path = [p.parent for p in packages]
    process = run_python(*command, cwd=tmp_path, path=path, timeout=1200, **environment)
    assert process.returncode == 0, process.stdout[-1500:] + process.stderr[-3000:]
    shutil.rmtree(tmp_path / "output", ignore_errors=True)


def test_reasons_are_about_blocks():
    """A comment that is not right above a block would hide nothing."""
    for page in PAGES:
        reasons = [reason for *_, reason in blocks(page) if reason]
        assert len(reasons) == read(page).count("<!-- not run:"), page
        assert all(len(reason) > 10 for reason in reasons)


def test_most_blocks_run():
    every = [block for page in PAGES for block in blocks(page) if block[0] != "yaml"]
    assert sum(reason is None for *_, reason in every) > 40 < len(every)
