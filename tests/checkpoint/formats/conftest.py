"""A small file of every format."""

import gzip
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.checkpoint.formats.helpers import Config, arrays, caffe_messages, mxnet_bytes, tensors

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.fixture
def samples(tmp_path):
    """{file name: (bytes, names of the weights)} of a small file per format."""
    objects = {"meta": {"config": Config()}, "state_dict": tensors()}
    torch.save(objects, tmp_path / "new.pth")
    torch.save(objects, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    content = {name: (tmp_path / name).read_bytes() for name in ("new.pth", "old.pth")}
    zoo = {"model": arrays(), "__author__": "zoo"}
    content["zoo.pkl"] = pickle.dumps(zoo)
    content["old.pkl"] = pickle.dumps(arrays(), protocol=2)
    shaped = {k: v for k, v in arrays().items() if v.ndim}
    content["net.params"] = mxnet_bytes(shaped)
    messages = caffe_messages()
    net = messages["NetParameter"](name="net")
    for name, value in shaped.items():
        layer = net.layer.add(name=name, type="Convolution")
        blob = layer.blobs.add(data=value.ravel())
        blob.shape.dim.extend(value.shape)
    content["net.caffemodel"] = net.SerializeToString()
    content["net.safetensors"] = safetensors.torch.save(
        {k: torch.from_numpy(v) for k, v in arrays().items()}, {"metadata": '{"epoch": 3}'}
    )
    content["net.caffemodel.h5"] = gzip.decompress((DATA / "caffe_snapshot.h5.gz").read_bytes())
    return content
