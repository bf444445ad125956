"""The yaml keys that d2ext adds to detectron2's; projects add theirs under `MODEL.<PROJECT>`."""

import torch

from d2ext.config.augmentation import add_augmentation_config
from d2ext.config.modeling import add_modeling_config
from d2ext.config.projects import config_functions
from d2ext.config.recipe import add_recipe_config

from detectron2.config import CfgNode
from detectron2.config import get_cfg as _detectron2_cfg


def add_d2ext_config(cfg: CfgNode) -> None:
    """Add the shared keys and change the few defaults that do not suit this collection."""
    # GPU when there is one; detectron2 insists on "cuda".
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    # A fixed seed, so that two runs of one command agree; negative: a different one each time.
    cfg.SEED = 42
    # Iterations between two lines on the console, in metrics.json and in TensorBoard.
    cfg.LOG_PERIOD = 20
    # People's own COCO-format data: "NAME=annotations.json,image_dir[,semantic_dir]" each.
    cfg.DATASETS.REGISTER = ()
    # Semantic ground truth: "none", "dataset" (maps on disk), "instances" (derived from the masks)
    # or "auto" (the former where there are maps, else the latter).
    cfg.INPUT.SEMANTIC = "none"
    add_augmentation_config(cfg)
    # Measured in addition to what a data set's evaluator_type asks for: "coco", "boundary" (COCO's
    # AP with boundary IoU), "voc_sds" (mAP^r).
    cfg.TEST.METRICS = []
    # IoU thresholds of mAP^r.
    cfg.TEST.MAPR_IOUS = [0.5, 0.7]
    # mAP^r by the area under the precision-recall curve instead of eleven points.
    cfg.TEST.MAPR_AREA = False
    # Result by which to keep model_best.pth, e.g. "segm/AP", or "NAME/segm/AP" with several test
    # sets; "": none. Needs TEST.EVAL_PERIOD.
    cfg.TEST.BEST_METRIC = ""
    # End the training after so many evaluations in a row without a better value; 0: never.
    cfg.TEST.EARLY_STOPPING = 0
    # Leave out and count batches whose loss is NaN or infinite, instead of ending the training.
    cfg.SOLVER.SKIP_NONFINITE = False
    # Mixed precision (SOLVER.AMP.ENABLED): "float16", on a GPU, or "bfloat16", also on a CPU.
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Parts into which the batch of a step is cut, one after the other in memory.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Evaluate and keep an exponential moving average of the weights, e.g. 0.999; 0: the weights.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Parameters that stay as they are, by patterns of their names: ["backbone.*"].
    cfg.SOLVER.FREEZE = []
    # Where metrics go as well: "wandb", "mlflow".
    cfg.LOG_WRITERS = []
    # "SGD" or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning rate factors by prefix or pattern of parameter names: [["roi_heads.conv_new", 3.0],
    # ["*.box_head.*", 0.5]]; the longest one that fits is taken.
    cfg.SOLVER.LR_MULTIPLIERS = []
    # Learning rate factor from one layer of a network of timm to the one before, as in the recipes
    # of ViTs and ConvNeXt; 1: none.
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Weight decay for matrices and kernels only: not for norms, biases, scales of layers,
    # embeddings and tables of positions, whatever WEIGHT_DECAY_NORM and WEIGHT_DECAY_BIAS are.
    cfg.SOLVER.DECAY_MATRICES_ONLY = False
    # Learning rate at the end of WarmupCosineLR, as a fraction of the base rate.
    cfg.SOLVER.COSINE_END = 0.0
    # Number of checkpoint files to keep; older ones are deleted.
    cfg.SOLVER.CHECKPOINT_KEEP = 3
    add_recipe_config(cfg)


def get_cfg() -> CfgNode:
    """detectron2's defaults plus the keys of d2ext and of every imported project."""
    cfg = _detectron2_cfg()
    add_d2ext_config(cfg)
    add_modeling_config(cfg)
    for function in config_functions():
        function(cfg)
    return cfg
