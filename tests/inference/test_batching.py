"""Batches: which images come together, that the order stays, and that one image harms no other."""

import types

import numpy as np
import pytest
import torch

from d2ext.errors import UserError
from d2ext.inference import ImageRecord, Preparation, decode_images, predict_in_batches
from d2ext.inference.batching import padded_shape

PREPARE = Preparation([], "BGR")


class Model:
    """Gives the first pixel of each image, and remembers the batches; fails for value 13, and for
    batches that hold a 12."""

    def __init__(self, divisor=32):
        self.backbone = types.SimpleNamespace(size_divisibility=divisor)
        self.batches = []

    def __call__(self, inputs):
        values = [int(x["image"][0, 0, 0]) for x in inputs]
        if 13 in values or (12 in values and len(values) > 1):
            raise RuntimeError("too\nlarge")
        self.batches.append(values)
        return [{"value": v, "size": (x["height"], x["width"])} for v, x in zip(values, inputs)]


def image(value, height=20, width=30):
    return np.full((height, width, 3), value, np.uint8)


def records(*images):
    return [ImageRecord(i, f"image {i}", pixels=x) for i, x in enumerate(images)]


def run(model, images, batch_size, window=None, workers=0, keep_images=False):
    decoded = decode_images(records(*images), PREPARE, workers, keep_images)
    return list(predict_in_batches(model, decoded, batch_size, window))


def test_only_images_that_are_padded_to_one_size_come_together():
    model = Model()
    images = [image(0), image(1, 31, 32), image(2, 33, 30), image(3, 1, 1), image(4, 64, 2)]
    assert [x.output["value"] for x in run(model, images, 8)] == [0, 1, 2, 3, 4]
    assert sorted(model.batches) == [[0, 1, 3], [2, 4]]
    model = Model(divisor=0)  # of a backbone that needs no padding
    run(model, images, 8)
    assert [len(b) for b in model.batches] == [1] * 5
    assert padded_shape(object(), np.zeros((3, 5, 7))) == (5, 7)


@pytest.mark.parametrize("workers", [0, 2])
def test_outputs_come_in_order_with_the_sizes_of_their_images(workers):
    rng = np.random.default_rng(1)
    images = [image(i % 12, *rng.integers(1, 100, 2)) for i in range(60)]
    found = run(Model(), images, 4, workers=workers, keep_images=True)
    assert [x.record.image_id for x in found] == list(range(60))
    for given, x in zip(images, found):
        assert x.output == {"value": given[0, 0, 0], "size": given.shape[:2]}
        np.testing.assert_array_equal(x.image, given)
        assert x.record.pixels is None


def test_an_image_waits_for_so_many_others_at_most():
    read = []

    def reading():
        for record in records(image(0, 99), *[image(i % 12) for i in range(1, 40)]):
            read.append(record.image_id)
            yield record

    found = predict_in_batches(Model(), decode_images(reading(), PREPARE, 0), 4, 10)
    assert next(found).record.image_id == 0 and len(read) == 10
    for prediction in found:
        assert len(read) - prediction.record.image_id <= 10


def test_full_batches_wait_for_nothing():
    model, read = Model(), []

    def reading():
        for record in records(*[image(i) for i in range(8)]):
            read.append(record.image_id)
            yield record

    next(predict_in_batches(model, decode_images(reading(), PREPARE, 0), 4, 100))
    assert read == [0, 1, 2, 3] == model.batches[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_an_error_of_that_image_alone(workers):
    images = [image(0), image(1)[:, :, 0], b"nothing", image(3).astype(float), image(4)]
    found = run(Model(), images, 2, workers=workers)
    assert [x.output and x.output["value"] for x in found] == [0, None, None, None, 4]
    assert (
        "(H, W, 3), not (20, 30)" in found[1].error and "'image 2' cannot be read" in found[2].error
    )
    assert "8 bits per channel" in found[3].error and found[0].error is None


def test_what_cannot_be_computed_together_is_computed_alone():
    model = Model()
    found = run(model, [image(i) for i in (1, 12, 2, 13, 3)], 5)
    assert [x.output and x.output["value"] for x in found] == [1, 12, 2, None, 3]
    assert found[3].error == "image 'image 3' cannot be predicted: too large"


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: device-side assert"), AttributeError("x")]
)
def test_a_lost_gpu_and_wrong_code_end_all(error):
    def model(inputs):
        raise error

    with pytest.raises(type(error)):
        run(model, [image(1), image(2)], 2)


def test_an_image_too_large_for_the_memory_does_not():
    def model(inputs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    assert "out of memory" in run(model, [image(1)], 1)[0].error


@pytest.mark.parametrize(("batch_size", "window"), [(0, None), (4, 3)])
def test_sizes_that_make_no_sense_are_refused(batch_size, window):
    with pytest.raises(UserError, match="batch"):
        run(Model(), [image(1)], batch_size, window)
