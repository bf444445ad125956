"""The bar in a terminal, and lines where there is none."""

import io
import json
import logging
import sys

from d2ext.engine import train
from d2ext.engine.setup import LOGGERS

from detectron2.utils.logger import setup_logger


class Terminal(io.StringIO):
    """A text stream that says that it is a terminal."""

    def isatty(self):
        return True


def run(experiment, folder, monkeypatch, stderr):
    stdout = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "stdout", stdout)
    getattr(setup_logger, "cache_clear", lambda: None)()
    folder.mkdir()
    for name in LOGGERS:
        logging.getLogger(name).handlers.clear()
        setup_logger(str(folder), name=name)
    train(experiment)
    monkeypatch.undo()
    return stdout.getvalue()


def test_a_terminal_shows_a_bar_and_files_get_the_same_lines_and_numbers(
    short_run, tmp_path, monkeypatch
):
    bar, plain = Terminal(), io.StringIO()
    shown = run(short_run("mask_rcnn", "yaml", "bar"), tmp_path / "bar", monkeypatch, bar)
    lines = run(short_run("mask_rcnn", "yaml", "plain"), tmp_path / "plain", monkeypatch, plain)
    assert "6/6" in bar.getvalue() and "loss=" in bar.getvalue() and "<" in bar.getvalue()
    assert "6/6" not in plain.getvalue()
    assert "total_loss" in lines and "total_loss" not in shown  # the bar stands for these
    assert "Saving checkpoint" in shown  # other lines stay
    for folder in ("bar", "plain"):
        assert (tmp_path / folder / "log.txt").read_text().count("total_loss") == 6
    one, other = (
        [json.loads(x) for x in (tmp_path / name / "metrics.json").read_text().splitlines()]
        for name in ("bar", "plain")
    )
    assert [set(x) for x in one] == [set(x) for x in other]
    assert [x.get("total_loss") for x in one] == [x.get("total_loss") for x in other]
