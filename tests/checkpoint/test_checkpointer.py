"""Writing, crashing, reading and refusing checkpoints."""

import copy
import os
import pickle
import re
import resource
import signal
import urllib.request

import numpy as np
import pytest
import torch
from iopath.common.file_io import PathHandler
from torch import nn

from d2ext.checkpoint import Checkpointer, RNGState, read_metadata
from d2ext.checkpoint import checkpointer as module
from d2ext.checkpoint.convert import save_weights
from d2ext.errors import UserError

from detectron2.engine import SimpleTrainer


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def weights(model):
    return copy.deepcopy(model.state_dict())


def message(call, *arguments, **options):
    with pytest.raises(UserError) as error:
        call(*arguments, **options)
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "output"


# -------------------------------------------------------------------------------------------------
# round trip


def test_weights_metadata_and_further_values_come_back(folder):
    model, metadata = make_model(0), {"thing_classes": ["cat", "dog"], "train_sets": ["a"]}
    Checkpointer(model, str(folder), metadata=metadata).save("model_0000004", iteration=4)
    path = folder / "model_0000004.pth"
    assert sorted(os.listdir(folder)) == ["last_checkpoint", "model_0000004.pth"]
    assert read_metadata(str(path)) == metadata

    other = make_model(1)
    checkpointer = Checkpointer(other, str(folder))
    rest = checkpointer.load(str(path))
    torch.testing.assert_close(weights(other), weights(model), rtol=0, atol=0)
    assert (rest["iteration"], rest["metadata"]) == (4, metadata)
    assert checkpointer.get_checkpoint_file() == str(path)


def test_a_checkpoint_of_a_whole_training_state_loads_without_executing_code(folder):
    """torch refuses everything but tensors and plain values with `weights_only`."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    trainer = SimpleTrainer(model, [], optimizer)
    checkpointer = Checkpointer(
        model, str(folder), metadata={"thing_classes": ["cat"]}, trainer=trainer, rng=RNGState()
    )
    checkpointer.save("model", iteration=3)
    data = torch.load(folder / "model.pth", weights_only=True)
    assert {"model", "trainer", "rng", "metadata", "iteration"} == set(data)

    other = make_model(1)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    Checkpointer(other, trainer=SimpleTrainer(other, [], other_optimizer), rng=RNGState()).load(
        str(folder / "model.pth")
    )
    assert len(other_optimizer.state_dict()["state"]) == len(list(model.parameters()))


def test_checkpointables_that_are_not_asked_for_stay_as_they_are(folder):
    Checkpointer(make_model(), str(folder), rng=RNGState()).save("model")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    checkpointer = Checkpointer(make_model(1), rng=RNGState())
    torch.manual_seed(5)
    checkpointer.load(str(folder / "model.pth"), checkpointables=[])
    assert torch.get_rng_state().equal(state)


def test_nothing_is_written_without_a_folder_or_by_other_processes(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Checkpointer(make_model()).save("model")
    Checkpointer(make_model(), str(folder), save_to_disk=False).save("model")
    assert os.listdir(tmp_path) == []


def test_no_path_loads_nothing():
    model = make_model()
    before = weights(model)
    assert Checkpointer(model).load("") == {}
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.pkl", "a.safetensors", "a"])
def test_metadata_is_known_for_every_type_of_file_and_address(folder, tmp_path, monkeypatch, name):
    metadata = {"thing_classes": ["cat", "dog"]}
    values = {key: value.detach() for key, value in make_model().state_dict().items()}
    kind = name if name.endswith((".pkl", ".safetensors")) else "model.pth"
    path = tmp_path / kind
    save_weights(str(path), values, metadata)
    path = path.rename(tmp_path / name)
    assert read_metadata(str(path)) == metadata

    class Server(PathHandler):
        def _get_supported_prefixes(self):
            return ["served://"]

        def _get_local_path(self, path, force=False, **kwargs):
            return str(tmp_path / path.removeprefix("served://"))

    manager = copy.deepcopy(module.PathManager)
    manager.register_handler(Server())
    monkeypatch.setattr(module, "PathManager", manager)
    assert read_metadata(f"served://{name}") == metadata
    assert read_metadata("served://gone.pth") == read_metadata("unknown://a.pth") == {}


def test_metadata_of_other_files_is_empty(tmp_path):
    torch.save({"model": {}}, tmp_path / "plain.pth")
    torch.save([1], tmp_path / "list.pth")
    torch.save({"metadata": 3}, tmp_path / "number.pth")
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"metadata": {"a": 1}}))
    for name in ("plain.pth", "list.pth", "number.pth", "garbage.pth", "weights.pkl", "absent.pth"):
        assert read_metadata(str(tmp_path / name)) == {}
    assert read_metadata("") == {}


def test_counters_of_batch_norm_are_no_surprise_to_frozen_layers(folder, caplog):
    from detectron2.layers import FrozenBatchNorm2d

    Checkpointer(make_model(), str(folder)).save("model")
    frozen = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4))
    Checkpointer(frozen).load(str(folder / "model.pth"))
    assert "num_batches_tracked" not in caplog.text


# -------------------------------------------------------------------------------------------------
# crashes while writing


@pytest.fixture
def saved(folder):
    """A folder with one good checkpoint, and its content."""
    checkpointer = Checkpointer(make_model(0), str(folder))
    checkpointer.save("model", iteration=1)
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def content(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder)}


def test_an_interrupt_while_writing_keeps_the_former_checkpoint(folder, saved, monkeypatch):
    def interrupted(data, f):
        f.write(b"half a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(module.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Checkpointer(make_model(1), str(folder)).save("model", iteration=2)
    assert content(folder) == saved


def test_a_killed_process_keeps_the_former_checkpoint_and_the_next_attempt_cleans_up(
    folder, saved, monkeypatch
):
    def killed(data, f):
        f.write(b"half a checkpoint")
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(module.torch, "save", killed)
            Checkpointer(make_model(1), str(folder)).save("model", iteration=2)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = content(folder)
    assert left.pop("model.pth.tmp") == b"half a checkpoint"
    assert left == saved
    Checkpointer(make_model(1), str(folder)).save("model", iteration=2)
    assert sorted(os.listdir(folder)) == ["last_checkpoint", "model.pth"]
    assert torch.load(folder / "model.pth", weights_only=True)["iteration"] == 2


def test_a_full_disk_is_named_in_one_line_and_keeps_the_former_checkpoint(folder, saved):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # acts like a full disk
    try:
        text = message(Checkpointer(make_model(1), str(folder)).save, "model", iteration=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert text.startswith(f"cannot write '{folder}/model.pth': File too large (")
    assert re.search(r"\(\d+ MiB are free on that disk\)$", text)
    assert content(folder) == saved


def test_the_tag_is_written_after_the_checkpoint(folder, saved, monkeypatch):
    def failing(data, f):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", failing)
    text = message(Checkpointer(make_model(1), str(folder)).save, "newer")
    assert text.startswith(f"cannot write '{folder}/newer.pth': No space left on device (")
    assert content(folder) == saved


# -------------------------------------------------------------------------------------------------
# files that cannot be loaded


def test_a_missing_file_is_named_with_the_keys_to_set():
    text = message(Checkpointer(make_model()).load, "/absent/model.pth")
    assert text.startswith(
        "checkpoint '/absent/model.pth' does not exist; set MODEL.WEIGHTS (yaml)"
    )


@pytest.mark.parametrize("address", ["file:///absent/model.pth", "s3x://bucket/model.pth"])
def test_a_missing_file_behind_an_address_is_named(address):
    assert f"checkpoint '{address}' does not exist" in message(
        Checkpointer(make_model()).load, address
    )


def test_a_missing_shipped_file_is_named():
    text = message(Checkpointer(make_model()).load, "d2ext://weights/absent.pth")
    assert text.startswith("no shared config 'weights/absent.pth'")


def test_a_failing_download_is_named_with_the_way_around(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    text = message(Checkpointer(make_model()).load, "https://absent.invalid/model.pth")
    assert text.startswith("cannot download 'https://absent.invalid/model.pth' (")
    assert "Name or service not known" in text and "MODEL.WEIGHTS (yaml)" in text


class NotPlain:
    """Something that torch does not unpickle without being told to."""


def foreign_files(folder):
    """{file: part of the message}."""
    good = folder / "good.pth"
    torch.save({"model": make_model().state_dict()}, good)
    files = {
        "empty.pth": (b"", "cannot be read: "),
        "garbage.pth": (b"garbage" * 99, "cannot be read: "),
        "text.pkl": (b"hello", "cannot be read: "),
        "empty.pkl": (b"", "cannot be read: "),
        "page.pth": (b"<html>not found</html>", "cannot be read: "),
        "truncated.pth": (good.read_bytes()[:-200], "cannot be read: "),
        "number.pkl": (pickle.dumps(5), "'model' is a int"),
        "global.pkl": (b"cabsent_module\nName\n.", "'model' is a absent_module.Name"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    objects = {
        "list.pth": ([1, 2], "is not of the form {'model': {name: tensor}}: 'model' is a list"),
        "number.pth": ({"model": 3}, "'model' is a int"),
        "empty_state.pth": ({"meta": {}, "state_dict": {}}, "it has 'nothing' ..."),
        "meta.pth": ({"meta": {}, "a": torch.zeros(1)}, "'meta' is a dict"),
        "object.pth": (NotPlain(), "test_checkpointer.NotPlain"),
        "other.pth": (
            {"model": {"layer.weight": torch.zeros(1)}},
            "has no weight of this model: it has 'layer.weight' ..., the model has '0.bias' ...",
        ),
        "shapes.pth": (
            {"model": {k: torch.zeros(9, 9) for k in make_model().state_dict()}},
            "has no weight of this model",
        ),
        "nothing.pth": ({"model": {}}, "has no weight of this model: it has 'nothing' ..."),
    }
    for name, (value, _) in objects.items():
        torch.save(value, folder / name)
    return {name: text for name, (_, text) in {**files, **objects}.items()}


def test_files_that_are_no_checkpoint_of_this_model_are_named_in_one_line(tmp_path):
    for name, text in foreign_files(tmp_path).items():
        model = make_model()
        before = weights(model)
        found = message(Checkpointer(model).load, str(tmp_path / name))
        assert found.startswith(f"checkpoint '{tmp_path}/{name}' ") and text in found, found
        torch.testing.assert_close(weights(model), before, rtol=0, atol=0)


def test_weights_of_a_part_of_the_model_load(tmp_path):
    """As of a backbone; what has another shape, as with other classes, stays as it is."""
    part = {"0.weight": torch.ones(4, 3, 3, 3), "0.bias": torch.zeros(9), "more": torch.zeros(1)}
    torch.save({"model": part}, tmp_path / "part.pth")
    model = make_model()
    before = weights(model)
    Checkpointer(model).load(str(tmp_path / "part.pth"))
    assert (model[0].weight == 1).all() and model[0].bias.equal(before["0.bias"])


def test_numpy_weights_of_detectron2s_zoo_load(tmp_path):
    arrays = {"model": {"0.bias": np.full(4, 7, np.float32)}, "__author__": "zoo"}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(arrays))
    model = make_model()
    Checkpointer(model).load(str(tmp_path / "zoo.pkl"))
    assert (model[0].bias == 7).all()


def test_a_training_state_of_another_network_is_named(folder):
    model, other = make_model(), nn.Sequential(nn.Conv2d(3, 4, 3))

    def trainer(model):
        return SimpleTrainer(model, [], torch.optim.SGD(model.parameters(), lr=0.1))

    Checkpointer(model, str(folder), trainer=trainer(model)).save("model")
    text = message(Checkpointer(other, trainer=trainer(other)).load, str(folder / "model.pth"))
    assert text.startswith(f"checkpoint '{folder}/model.pth' does not fit this run: loaded state")
