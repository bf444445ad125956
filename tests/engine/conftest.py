"""Short runs of real configs on a few small images."""

import pytest

from d2ext.engine import build_experiment

from tests.engine.helpers import CONFIGS, short_overrides


@pytest.fixture
def short_run(shapes_few, tmp_path):
    """Make an experiment: `short_run("htc", "yaml", "folder", "more=overrides")`."""

    def make(name, kind, folder, *more):
        overrides = short_overrides(name, kind, tmp_path / folder, shapes_few)
        return build_experiment(f"{CONFIGS[name]}.{kind}", overrides + list(more))

    return make
