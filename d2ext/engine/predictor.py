"""Inference on images, one by one or in batches, for both kinds of config."""

import copy
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from d2ext.checkpoint import Checkpointer, read_metadata
from d2ext.config.stored import load_stored_config
from d2ext.data import parse_register, register_coco_dataset
from d2ext.engine.experiment import Experiment
from d2ext.engine.lazy_experiment import LazyExperiment
from d2ext.engine.limits import check_device
from d2ext.engine.provenance import CONFIG_KEY, check_stored_settings, class_names
from d2ext.engine.recipe import recall_recipe
from d2ext.engine.setup import build_experiment
from d2ext.errors import UserError
from d2ext.inference import (
    AnyImage,
    ImageRecord,
    Prediction,
    Preparation,
    as_record,
    decode_images,
    predict_in_batches,
    read_bgr,
)

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog

# The number of classes in configs that leave it to the data: COCO's, detectron2's default.
_UNSET = 80

logger = logging.getLogger(__name__)


class Predictor:
    """The call of detectron2's `DefaultPredictor`, for yaml and lazy configs.

    Args:
        config: path of a config, a loaded config, or an `Experiment`.
        weights: checkpoint; default: the config's own.
        overrides: `key=value` strings, with a path only.
        device: default: the config's.

    Attributes:
        model: in evaluation mode.
        class_names: names from the checkpoint, else from the config's data sets, which need not be
            there, else numbers; also numbers where these names are not as many as the classes that
            the user sets.
        metadata: detectron2 `Metadata` with these names, for its `Visualizer`.
        weights: the checkpoint.
        preparation: makes model inputs of images.

    Raises:
        UserError: missing or unreadable files, unknown keys, no weights; settings that the weights
            are bound to are not those of their training, and no override names them.
    """

    @classmethod
    def from_weights(
        cls, weights: str, overrides: Sequence[str] = (), device: str | None = None
    ) -> "Predictor":
        """A predictor by a checkpoint alone, which holds the config of its training.

        Args:
            weights: checkpoint of a training with d2ext.
            overrides: `key=value` strings.
            device: default: the training's, or the CPU where that is not there.

        Raises:
            UserError: as the class; the file holds no config, or one that is refused, see
                `d2ext.config.stored`.
        """
        experiment = experiment_of_checkpoint(weights, overrides)
        return cls(experiment, weights, device=device)

    def __init__(
        self,
        config: str | os.PathLike | CfgNode | DictConfig | Experiment,
        weights: str | os.PathLike | None = None,
        overrides: Sequence[str] = (),
        device: str | None = None,
    ):
        if not isinstance(config, Experiment):
            is_path = isinstance(config, (str, os.PathLike))
            loaded = config if is_path else copy.deepcopy(config)
            config = build_experiment(loaded, overrides, with_data=False)
        path = os.fspath(weights) if weights is not None else config.init_checkpoint
        if not path:
            raise UserError(
                "no weights to predict with: pass weights=..., or set MODEL.WEIGHTS (yaml) or "
                "train.init_checkpoint (lazy)"
            )
        if device is not None:
            config.set_device(device)
        check_device(config)
        stored = read_metadata(path)
        recall_recipe(config, stored, path)
        check_stored_settings(config, stored, path)
        known = class_names(stored)
        self.class_names: list[str] = known or _names_from_data(config)
        count = config.num_classes()
        by_user = bool(config.chosen & {"MODEL.ROI_HEADS.NUM_CLASSES", LazyExperiment.CLASSES_KEY})
        if by_user or (not known and count != _UNSET):
            # What the user says wins: names of another number of classes are not theirs.
            self.class_names = self.class_names if len(self.class_names) == count else []
        config.set_num_classes(len(self.class_names) or count, stored.get("semantic_labels"))
        self.experiment, config.weights_follow = config, True
        self.model = config.build_model().eval()
        Checkpointer(self.model).load_complete(path)
        self.class_names = self.class_names or [str(i) for i in range(config.num_classes())]
        self.metadata, self.weights = Metadata(thing_classes=self.class_names), path
        self.preparation = Preparation(config.test_augmentations(), config.image_format)

    @torch.no_grad()
    def __call__(self, original_image: AnyImage | Sequence[AnyImage]) -> Any:
        """Predict on one image, or on each of a list.

        Args:
            original_image: uint8, (H, W, 3), BGR, as `cv2.imread` gives it; or the path of a file,
                its bytes, a PIL image, a tensor (3, H, W), uint8, RGB; or a list of these.

        Returns:
            The model's output for the image, e.g. `{"instances": Instances}` in its pixels; a list
            of outputs for a list, one image after the other. `stream` has batches.

        Raises:
            UserError: it is none of these, or the file cannot be read.
        """
        if isinstance(original_image, (list, tuple)):
            return [self(image) for image in original_image]
        image: Any = original_image
        return self.model([self.prepare(read_bgr(image))])[0]

    def prepare(self, original_image: np.ndarray) -> dict[str, Any]:
        """The model's input for one BGR image (see `__call__`)."""
        pixels = self.preparation.resized(original_image)
        height, width = original_image.shape[:2]
        return {"image": torch.from_numpy(pixels).float(), "height": height, "width": width}

    def stream(
        self,
        images: Iterable[AnyImage | ImageRecord],
        batch_size: int | None = None,
        workers: int | None = None,
    ) -> Iterator[Any]:
        """Outputs for many images, in their order, computed in batches.

        Only images that are padded to the same size come into one batch, so that padding changes
        nothing; sums are rounded in another order, which changes scores and boxes by less than
        1e-5 of their size and may decide otherwise where two candidates are as good.

        Args:
            images: a list, generator, or other iterable of what `__call__` takes.
            batch_size: default: 8 on a GPU, 1 on the CPU.
            workers: processes that read images; default: up to 4 with a GPU, none without.

        Raises:
            UserError: as `__call__`, at the place of that image.
        """
        for prediction in self.predict_records(map(as_record, images), batch_size, workers):
            if prediction.error is not None:
                raise UserError(prediction.error)
            yield prediction.output

    def predict_records(
        self,
        records: Iterable[ImageRecord],
        batch_size: int | None = None,
        workers: int | None = None,
        keep_images: bool = False,
    ) -> Iterator[Prediction]:
        """As `stream`, with the record of each image, and with the reason for every image that
        cannot be predicted, in place of an error.

        Args:
            records: see `d2ext.inference.find_images`.
            batch_size, workers: see `stream`.
            keep_images: whether a prediction shall hold the image itself.
        """
        on_gpu = self.experiment.device.startswith("cuda")
        if batch_size is None:
            batch_size = 8 if on_gpu else 1
        if workers is None:
            workers = min(4, os.cpu_count() or 1) if on_gpu else 0
        if workers < 0:
            raise UserError(f"{workers} processes cannot read images; 0 stands for this one alone")
        decoded = decode_images(records, self.preparation, workers, keep_images)
        return predict_in_batches(self.model, decoded, batch_size)

    def draw(self, image: np.ndarray, instances, threshold: float = 0.5) -> np.ndarray:
        """Draw instances with at least `threshold` score; BGR in, BGR out.

        Small images come back enlarged, so that names and outlines can be read.
        """
        from d2ext.visualization import draw_predictions

        return draw_predictions(image[:, :, ::-1], instances, self.metadata, threshold)[:, :, ::-1]


def experiment_of_checkpoint(weights: str, overrides: Sequence[str] = ()) -> Experiment:
    """The run that a checkpoint was trained in, as the file says; for prediction, without data.

    Raises:
        UserError: the file cannot be read or holds no config, or one that is refused.
    """
    Checkpointer(torch.nn.Identity()).check_existence(weights)
    text = read_metadata(weights).get(CONFIG_KEY)
    if not isinstance(text, str):
        raise UserError(
            f"checkpoint '{weights}' holds no config of a training; name it with --config-file, "
            "or as Predictor(config, weights)"
        )
    cfg = load_stored_config(text, weights, overrides)
    try:
        experiment = build_experiment(cfg, with_data=False)
    except OmegaConfBaseException as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the config inside '{weights}' cannot be used: {reason}") from error
    experiment.note_chosen(overrides)
    if experiment.device.startswith("cuda") and not torch.cuda.is_available():
        logger.info("no GPU as in the training: predicting on the CPU")
        experiment.set_device("cpu")
    return experiment


def _names_from_data(experiment: Experiment) -> list[str]:
    for text in experiment.unread:
        try:
            register_coco_dataset(*parse_register(text))
        except UserError as error:
            logger.warning("%s; it is not needed, but for names of classes", error)
    known = set(DatasetCatalog.list())
    for name in experiment.test_sets() + experiment.train_sets():
        names = getattr(MetadataCatalog.get(name), "thing_classes", ()) if name in known else ()
        if names:
            return list(names)
    return []
