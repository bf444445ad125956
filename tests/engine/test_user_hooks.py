"""Hooks of a program: their order, their state, and what they may be."""

import pytest
import torch

from d2ext.engine import train
from d2ext.errors import UserError

from detectron2.engine import HookBase

from tests.engine.test_resume import PowerFailure, failing_after


class Counter(HookBase):
    """Counts the steps of all parts of a run, and notes what is called."""

    def __init__(self, name="", calls=None):
        self.name, self.calls, self.steps = name, calls if calls is not None else [], 0

    def before_train(self):
        self.calls.append(f"{self.name} before_train")

    def before_step(self):
        self.calls.append(f"{self.name} before_step")

    def after_step(self):
        self.steps += 1
        self.calls.append(f"{self.name} after_step {self.trainer.iter}")
        self.trainer.storage.put_scalar("steps_seen", self.steps, smoothing_hint=False)

    def after_train(self):
        self.calls.append(f"{self.name} after_train")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def test_hooks_and_functions_run_in_their_order_before_checkpoints_and_writers(short_run, tmp_path):
    calls, files = [], []

    def note(trainer):
        calls.append(f"function {trainer.iter}")
        files.append((tmp_path / f"run/model_{trainer.iter:07d}.pth").exists())

    run = short_run("mask_rcnn", "yaml", "run", "SOLVER.MAX_ITER=2")
    train(run, hooks=[Counter("a", calls), note, Counter("b", calls)])
    assert calls == [
        *("a before_train", "b before_train"),
        *("a before_step", "b before_step", "a after_step 0", "function 0", "b after_step 0"),
        *("a before_step", "b before_step", "a after_step 1", "function 1", "b after_step 1"),
        *("a after_train", "b after_train"),
    ]
    assert files == [False, False] and (tmp_path / "run/model_0000001.pth").exists()
    assert '"steps_seen": 2' in (tmp_path / "run/metrics.json").read_text()


def test_states_of_hooks_of_one_class_are_saved_and_restored_each(short_run, tmp_path):
    class Total:
        """A function with a memory."""

        def __init__(self):
            self.sum = 0

        def __call__(self, trainer):
            self.sum += trainer.iter

        def state_dict(self):
            return {"sum": self.sum}

        def load_state_dict(self, state):
            self.sum = state["sum"]

    hooks = [Counter("a"), Counter("b"), Total()]
    hooks[1].steps = 100
    with pytest.raises(PowerFailure):
        train(failing_after(short_run("mask_rcnn", "yaml", "run"), batches=5), hooks=hooks)
    resumed = [Counter("a"), Counter("b"), Total()]
    train(short_run("mask_rcnn", "yaml", "run"), resume=True, hooks=resumed)
    # The checkpoint after four iterations is where it goes on.
    assert [resumed[0].steps, resumed[1].steps, resumed[2].sum] == [6, 106, 0 + 1 + 2 + 3 + 4 + 5]


def test_hooks_do_not_change_the_training_and_may_be_left_out_later(short_run, tmp_path, caplog):
    train(short_run("mask_rcnn", "yaml", "plain"))
    train(short_run("mask_rcnn", "yaml", "hooked", "SOLVER.MAX_ITER=3"), hooks=[Counter()])
    train(short_run("mask_rcnn", "yaml", "hooked"), resume=True)
    assert "Cannot find the hook 'UserHooks'" in caplog.text
    files = [tmp_path / f"{name}/model_final.pth" for name in ("plain", "hooked")]
    one, other = (torch.load(f, weights_only=True)["iteration"] for f in files)
    assert one == other == 5


@pytest.mark.parametrize("wrong", [3, Counter, "print"])
def test_what_is_no_hook_is_refused(short_run, wrong):
    with pytest.raises(UserError, match="hooks has .*; it takes objects of detectron2's HookBase"):
        train(short_run("mask_rcnn", "yaml", "run"), hooks=[wrong])
