"""The networks of the demo; a new project joins by a line in `MODELS`."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from d2ext.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
_MARKER = ".made_by_demo"


class Model(NamedTuple):
    """One network of the demo.

    Attributes:
        name: of the config, of the output folder, and in metrics.json.
        title: for people.
        script, config: the command line, relative to the repository or absolute.
        about: what is special about it, one sentence.
    """

    name: str
    title: str
    script: str
    config: str
    about: str


MODELS = (
    Model(
        "mnc_tiny",
        "MNC",
        "projects/MNC/train_net.py",
        "projects/MNC/configs/mnc_tiny.py",
        "Five stages: boxes, masks in them, classes of the masks, then masks and classes again on "
        "refined boxes, with gradients through the boxes (Dai et al., 2016).",
    ),
    Model(
        "fcis_tiny",
        "FCIS",
        "projects/FCIS/train_net.py",
        "projects/FCIS/configs/fcis_tiny.py",
        "No network per region: maps of the whole image say inside or outside for each part of a "
        "region, and masks and classes are read from them together (Li et al., 2017).",
    ),
    Model(
        "mask_rcnn_tiny",
        "Mask R-CNN",
        "tools/train_net.py",
        "configs/mask_rcnn_tiny.yaml",
        "One box head and one mask head on the proposals of a region proposal network: "
        "the baseline of the field (He et al., 2017).",
    ),
    Model(
        "cascade_mask_rcnn_tiny",
        "Cascade Mask R-CNN",
        "tools/train_net.py",
        "configs/cascade_mask_rcnn_tiny.py",
        "Three box heads in a row, each trained on the boxes of the one before with a stricter "
        "overlap; one mask head at the end (Cai and Vasconcelos, 2018).",
    ),
    Model(
        "htc_tiny",
        "Hybrid Task Cascade",
        "projects/HTC/train_net.py",
        "projects/HTC/configs/htc_tiny.py",
        "Box and mask heads interleaved in every stage, mask features handed on from stage to "
        "stage, and a semantic branch that adds context to both (Chen et al., 2019).",
    ),
)


def select(names: Sequence[str]) -> list[Model]:
    """The models of these names, in the order of `MODELS`, and after them those of the names
    that are paths of configs, of any installed project; all of `MODELS` without names."""
    known = [model.name for model in MODELS]
    configs = [Path(name) for name in names if Path(name).suffix in (".yaml", ".py")]
    for name in names:
        if name not in known and Path(name) not in configs:
            raise UserError(
                f"--models {name}: no such model; there are {', '.join(known)}, "
                "and a path of a config (.yaml, .py) will do"
            )
    chosen = [model for model in MODELS if not names or model.name in names]
    for path in configs:
        if path.stem in [model.name for model in chosen]:
            raise UserError(f"--models {path}: there is another model '{path.stem}'")
        config = str(path.resolve())
        chosen.append(Model(path.stem, path.stem, "tools/train_net.py", config, f"From {path}."))
    return chosen


def overrides_for(model: Model, overrides: Sequence[str], names: Sequence[str] = ()) -> list[str]:
    """Of the `KEY=VALUE` and `MODEL:KEY=VALUE` words, those that concern one model.

    Args:
        names: what `select` was given.
    """
    known = [m.name for m in MODELS] + [Path(name).stem for name in names]
    found = []
    for text in overrides:
        key, equals, value = text.partition("=")
        name, colon, rest = key.rpartition(":")
        if not equals:
            raise UserError(f"--override {text}: write KEY=VALUE or MODEL:KEY=VALUE")
        if not colon or name == model.name:
            found.append(f"{rest}={value}")
        elif name not in known:
            raise UserError(f"--override {text}: there is no model '{name}'")
    return found


def make_fresh(folder: Path) -> None:
    """An empty folder, replacing one that an earlier demo made.

    Raises:
        UserError: the folder exists and is someone else's.
    """
    try:
        if folder.exists():
            if not (folder / _MARKER).is_file():
                raise UserError(
                    f"{folder} exists and was not made by the demo; choose another --output"
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        (folder / _MARKER).touch()
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror or error}") from error
