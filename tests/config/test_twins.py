"""The yaml and the lazy config of one name describe the same run.

Every pair is compared in full: model, optimiser, schedule, data and all other settings. Networks of
full size are built without initialising their weights; the tiny ones are run on one batch as well.
"""

from pathlib import Path

import pytest

from d2ext.engine import twins

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT / "configs", *sorted(ROOT.glob("projects/*/configs"))]
STEMS = [Path(stem).relative_to(ROOT) for folder in FOLDERS for stem in twins.config_stems(folder)]
STEMS = [str(stem) for stem in STEMS]
TINY = [stem for stem in STEMS if "_tiny" in stem]


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture(autouse=True)
def small_data(data_folder):
    with twins.few_images(data_folder):
        yield


@pytest.mark.parametrize("stem", STEMS)
def test_twins_have_the_same_settings(stem):
    twins.check_settings(str(ROOT / stem))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("stem", STEMS)
def test_twins_load_the_same_data(stem):
    twins.check_loaders(str(ROOT / stem))


@pytest.mark.parametrize("stem", STEMS)
def test_twins_build_the_same_network_optimiser_and_schedule(stem):
    rates = twins.check_network(str(ROOT / stem))
    assert len(set(rates)) > 1  # MNC and FCIS on VOC: one step and no warm-up


@pytest.mark.parametrize("stem", TINY)
def test_tiny_twins_compute_the_same_losses_step_and_detections(stem):
    twins.check_results(str(ROOT / stem))
