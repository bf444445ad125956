"""Fixtures of the data tests: a few generated images, and catalogs that are put back afterwards."""

import pytest

from d2ext.data import register_shapes, shapes

from detectron2.data import DatasetCatalog, MetadataCatalog

NUM_IMAGES = 27  # of split "train": image 6 is empty, image 27 holds a crowd region


@pytest.fixture(autouse=True)
def catalogs():
    """detectron2's catalogs are global: undo what a test registers or removes."""
    datasets, metadata = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    yield
    for catalog, saved in ((DatasetCatalog, datasets), (MetadataCatalog, metadata)):
        catalog.data.clear()
        catalog.data.update(saved)


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory):
    """Data set folder with the first images of one split."""
    root = str(tmp_path_factory.mktemp("datasets"))
    shapes.generate("train", root, NUM_IMAGES)
    return root


@pytest.fixture
def shapes_few(shapes_root):
    """Name of a registered set of a few images."""
    register_shapes("shapes_few", "train", shapes_root, NUM_IMAGES)
    return "shapes_few"
