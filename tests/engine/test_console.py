"""Before the first iteration the console shows what a person wants to know; log.txt has it all."""

import logging
import sys

import pytest

from d2ext.engine import main
from d2ext.engine.console import begin_brief, end_brief, log_file_only

from detectron2.utils.logger import setup_logger

from tests.engine.helpers import CONFIGS, short_overrides

MOST_LINES = 15


@pytest.mark.parametrize("kind", ["yaml", "py"])
def test_a_run_shows_few_lines_before_its_first_iteration(
    register_argument, tmp_path, capsys, kind
):
    overrides = [
        *short_overrides("mask_rcnn", kind, tmp_path / "run", "few"),
        *("train.max_iter=1", "train.checkpointer.period=100"),
    ]
    config = f"{CONFIGS['mask_rcnn']}.{kind}"
    with pytest.raises(SystemExit) as end:
        main(["--config-file", config, "--register", register_argument, *overrides])
    assert not end.value.code
    console = capsys.readouterr().out
    before, found, after = console.partition("Starting training from iteration 0")
    assert found and 8 <= before.count("\n") <= MOST_LINES
    for words in (
        "device cpu",
        config,
        "few: 26 images",
        "instances (",
        "parameters, 8 classes",
        "weights: none are loaded, all start anew",
        "schedule 1 iterations of 2 images",
        f"output folder {tmp_path / 'run'}",
        f"{tmp_path / 'run'}/log.txt",
    ):
        assert words in before
    assert "total_loss" in after
    log = (tmp_path / "run/log.txt").read_text()
    for words in ("Environment info", "Model:", "Serializing", "device cpu", "total_loss"):
        assert words in log
    for words in ("Environment info", "Model:", "Serializing"):
        assert words not in before


@pytest.fixture
def open_console(tmp_path):
    """Function that sets up loggers as those of a run; called in the test, whose stream counts."""

    def set_up():
        for name in ("fvcore", "detectron2", "d2ext"):
            setup_logger(str(tmp_path), name=name, color=False)
        begin_brief()

    yield set_up
    end_brief()


def test_warnings_reach_the_console_and_long_notes_only_the_log(open_console, capsys, tmp_path):
    open_console()
    logging.getLogger("detectron2.x").info("a table")
    logging.getLogger("fvcore.x").warning("a warning\nof two lines")
    logging.getLogger("d2ext.x").info("a line")
    logging.getLogger("d2ext.x").info("a picture\nof the model")
    shown = capsys.readouterr().out
    assert "a warning\nof two lines" in shown and "a line" in shown
    assert "a table" not in shown and "a picture" not in shown
    log = (tmp_path / "log.txt").read_text()
    assert "a table" in log and "a picture\nof the model" in log and "a warning" in log


def test_after_the_start_the_console_shows_everything(open_console, capsys):
    open_console()
    end_brief()
    logging.getLogger("detectron2.x").info("a table")
    assert "a table" in capsys.readouterr().out


def test_what_is_said_in_another_form_is_in_the_log_only(open_console, capsys, tmp_path):
    open_console()
    with log_file_only():
        logging.getLogger("fvcore.x").warning("a long list")
    logging.getLogger("fvcore.x").warning("the end")
    shown = capsys.readouterr().out
    assert "a long list" not in shown and "the end" in shown
    assert "a long list" in (tmp_path / "log.txt").read_text()


def test_streams_of_others_are_left_alone(capsys):
    own = logging.StreamHandler(sys.stderr)
    logging.getLogger("d2ext").addHandler(own)
    begin_brief()
    assert own.filters == []
    end_brief()
