"""Which training a process continues by itself."""

import json

import pytest

from d2ext.engine import restarts


@pytest.fixture
def torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")


def test_a_process_continues_what_the_same_torchrun_has_begun(torchrun, tmp_path):
    assert not restarts.is_restarted(str(tmp_path))
    restarts.note_start(str(tmp_path))
    assert restarts.is_restarted(str(tmp_path))


def test_the_run_of_another_torchrun_or_of_none_is_left_alone(torchrun, tmp_path, monkeypatch):
    restarts.note_start(str(tmp_path))
    ours = json.loads((tmp_path / restarts.JOB_FILE).read_text())
    machine, number, began = ours[0].split()
    other = f"{machine} {number} {int(began) + 1}"  # the same number, used again
    (tmp_path / restarts.JOB_FILE).write_text(json.dumps([other]))
    assert not restarts.is_restarted(str(tmp_path))
    (tmp_path / restarts.JOB_FILE).write_text("{")
    assert not restarts.is_restarted(str(tmp_path))
    (tmp_path / restarts.JOB_FILE).write_text(json.dumps([other, *ours]))
    assert restarts.is_restarted(str(tmp_path))
    monkeypatch.delenv("RANK")  # not under torchrun
    assert not restarts.is_restarted(str(tmp_path))
