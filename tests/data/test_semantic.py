"""Semantic ground truth from instance masks, and label counts of data sets."""

import numpy as np
import pytest
import torch
from PIL import Image

from d2ext.data import semantic_from_instances, semantic_num_labels
from d2ext.errors import UserError

from detectron2.data import DatasetCatalog, MetadataCatalog


def _oracle(masks, classes, num_classes, ignore):
    """Pixel by pixel: the covering instance of least area (the later one of two equal ones)."""
    height, width = ignore.shape
    labels = np.empty((height, width), int)
    areas = [m.sum() for m in masks]
    for y in range(height):
        for x in range(width):
            covering = [i for i in range(len(masks)) if masks[i][y, x]]
            if covering:
                labels[y, x] = classes[min(covering, key=lambda i: (areas[i], -i))]
            else:
                labels[y, x] = 255 if ignore[y, x] else num_classes
    return labels


@pytest.mark.parametrize("seed", range(4))
def test_semantic_from_instances_matches_a_pixelwise_oracle(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((5, 7, 9)) < np.array([0.2, 0.5, 0.3, 0.3, 0.8])[:, None, None]
    masks[3] = np.roll(masks[2], 3)  # equal areas
    classes, ignore = rng.integers(0, 4, 5), rng.random((7, 9)) < 0.3
    result = semantic_from_instances(
        torch.from_numpy(masks), torch.from_numpy(classes), 7, 9, 4, torch.from_numpy(ignore)
    )
    assert result.dtype == torch.uint8
    np.testing.assert_array_equal(result.numpy(), _oracle(masks, classes, 4, ignore))


def test_image_without_instances_is_background():
    empty = torch.zeros(0, 3, 4, dtype=torch.bool)
    labels = semantic_from_instances(empty, torch.zeros(0, dtype=torch.int64), 3, 4, num_classes=8)
    assert labels.shape == (3, 4) and (labels == 8).all()


def test_number_of_labels_per_mode(shapes_few):
    assert semantic_num_labels(shapes_few, "none") == 0
    assert semantic_num_labels([shapes_few], "auto") == 12
    assert semantic_num_labels(shapes_few, "dataset") == 12
    assert semantic_num_labels(shapes_few, "instances") == 9


def _register(name, **metadata):
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(thing_classes=["a", "b"], **metadata)


def test_number_of_labels_without_maps(shapes_few):
    _register("plain")
    assert semantic_num_labels("plain", "auto") == 3
    with pytest.raises(UserError, match="'plain' has no semantic maps; use semantic mode 'auto'"):
        semantic_num_labels("plain", "dataset")
    with pytest.raises(UserError, match="different numbers of semantic labels"):
        semantic_num_labels(["plain", shapes_few], "auto")
    with pytest.raises(UserError, match="unknown semantic mode 'automatic'"):
        semantic_num_labels("plain", "automatic")
    with pytest.raises(UserError, match="unknown data set 'plane'; did you mean plain"):
        semantic_num_labels("plane", "auto")


def test_number_of_labels_is_read_from_the_maps_when_unknown(tmp_path):
    for index, values in enumerate(([0, 3], [255, 6], [255, 255])):
        Image.fromarray(np.array([values], np.uint8)).save(tmp_path / f"{index}.png")
    _register("mapped", sem_seg_root=str(tmp_path))
    assert semantic_num_labels("mapped", "auto") == 7
    _register("unmapped", sem_seg_root=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no labelled semantic map"):
        semantic_num_labels("unmapped", "dataset")


def test_more_classes_than_labels_below_255_are_refused():
    masks = torch.ones(1, 2, 2, dtype=torch.bool)
    labels = semantic_from_instances(masks, torch.tensor([253]), 2, 2, 254)
    assert labels.tolist() == [[253, 253]] * 2
    with pytest.raises(UserError, match="255 classes: 255 stands for"):
        semantic_from_instances(masks, torch.tensor([253]), 2, 2, 255)
