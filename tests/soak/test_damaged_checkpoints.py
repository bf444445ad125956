"""Checkpoints with flipped, lost or foreign bytes are refused, or load the very weights."""

import torch

from d2ext.checkpoint import Checkpointer
from d2ext.errors import UserError
from d2ext.utils.testing import damaged_copies

from tests.soak.conftest import FULL

COUNT = 1000 if FULL else 100


def model():
    """Two layers have equal shapes, so that their parts can be taken for each other."""
    return torch.nn.Sequential(*[torch.nn.Linear(*x) for x in ((40, 60), (40, 60), (60, 7))])


def test_damaged_checkpoints_load_no_other_weights(tmp_path, counted):
    torch.manual_seed(3)
    trained = model()
    optimizer = torch.optim.Adam(trained.parameters())
    Checkpointer(trained, str(tmp_path), optimizer=optimizer).save("model")
    path = tmp_path / "model.pth"
    outcomes = {"refused": 0, "the very weights": 0, "other weights": 0}
    for _, content in damaged_copies(path.read_bytes(), COUNT, seed=11):
        path.write_bytes(content)
        loaded = model()
        try:
            Checkpointer(loaded).load(str(path), checkpointables=[])
        except UserError:
            outcomes["refused"] += 1
            continue
        same = all(map(torch.equal, loaded.state_dict().values(), trained.state_dict().values()))
        outcomes["the very weights" if same else "other weights"] += 1
    assert outcomes["other weights"] == 0
    assert outcomes["refused"] > 0.9 * COUNT
    counted({"checkpoints": COUNT, **outcomes})
