"""What the model zoo is made of: trainings on the built-in shapes, and the papers' ablations, which
they are the small form of. The published values are those of the papers' tables, on their data."""

from typing import NamedTuple


class Run(NamedTuple):
    """A config that is trained, or the weights of such a training tested in another way.

    Attributes:
        name: of its folder.
        config: as `d2ext train` takes it.
        options: yaml overrides.
        weights_of: name of the run whose weights are tested with `options`; "": it is trained.
    """

    name: str
    config: str
    options: tuple[str, ...] = ()
    weights_of: str = ""


class Step(NamedTuple):
    """A row of an ablation.

    Attributes:
        run: name of the run.
        about: what it is, in the words of the table.
        published: value of the paper for it, in the metric of the chain; None: it has none.
        against: the run that it is compared with; "" for none.
    """

    run: str
    about: str
    published: float | None = None
    against: str = ""


class Chain(NamedTuple):
    """An ablation of a paper.

    Attributes:
        title: heading.
        published: metric, data and place of the published values.
        metric: of our results that stands for it, such as `segm/AP50`.
        steps: the rows.
    """

    title: str
    published: str
    metric: str
    steps: tuple[Step, ...]


EQUAL = ("MODEL.FCIS.LOSS_WEIGHTS=[1.0,1.0,1.0]",)
LONG = ("SOLVER.MAX_ITER=1800",)
HTC_LONG = ("SOLVER.MAX_ITER=800",)
TEXT = ("MODEL.HTC.SEMANTIC.LOSS_WEIGHT=1.0",)
ALONE = ("MODEL.HTC.SEMANTIC.FUSION=[]",)
UNTAUGHT = ("MODEL.HTC.SEMANTIC.LOSS_WEIGHT=0.0",)

RUNS = (
    Run("mask_rcnn_tiny", "mask_rcnn_tiny"),
    Run("cascade_mask_rcnn_tiny", "cascade_mask_rcnn_tiny"),
    Run("mnc_tiny", "mnc_tiny"),
    Run("fcis_tiny", "fcis_tiny"),
    Run("htc_tiny", "htc_tiny"),
    Run("htc_tiny_ablation_cascade", "htc_tiny_ablation_cascade"),
    Run("htc_tiny_ablation_interleaved", "htc_tiny_ablation_interleaved"),
    Run("htc_tiny_ablation_flow", "htc_tiny_ablation_flow"),
    Run("mnc_tiny_unshared", "mnc_tiny_unshared"),
    Run(
        "mnc_tiny_step_by_step",
        "mnc_tiny_3stage",
        ("MODEL.MNC.BOX_GRADIENT=False", "MODEL.MNC.GATE_GRADIENT=False"),
    ),
    Run("mnc_tiny_3stage", "mnc_tiny_3stage"),
    Run("mnc_tiny_detach", "mnc_tiny_detach"),
    Run("mnc_tiny_without_voting", "mnc_tiny", ("MODEL.MNC.VOTING=False",), "mnc_tiny"),
    Run("fcis_tiny_ablation_translation_invariant", "fcis_tiny_ablation_translation_invariant"),
    Run("fcis_tiny_ablation_separate", "fcis_tiny_ablation_separate"),
    Run("fcis_tiny_random_sampling", "fcis_tiny", ("MODEL.FCIS.OHEM=False",)),
    Run("fcis_tiny_without_refinement", "fcis_tiny", ("MODEL.FCIS.REFINE=False",), "fcis_tiny"),
    Run("fcis_tiny_equal", "fcis_tiny", EQUAL),
    Run("fcis_tiny_separate_equal", "fcis_tiny_ablation_separate", EQUAL),
    Run("fcis_tiny_long", "fcis_tiny", LONG),
    Run("fcis_tiny_separate_long", "fcis_tiny_ablation_separate", LONG),
    Run("htc_tiny_long", "htc_tiny", HTC_LONG),
    Run("htc_tiny_flow_long", "htc_tiny_ablation_flow", HTC_LONG),
    Run("htc_tiny_semantic_text", "htc_tiny", TEXT),
    Run("htc_tiny_semantic_alone", "htc_tiny", ALONE),
    Run("htc_tiny_semantic_untaught", "htc_tiny", UNTAUGHT),
)

CHAINS = (
    Chain(
        "HTC: from a cascade to the hybrid task cascade",
        "mask AP on COCO val2017, R-50-FPN, 20 epochs (paper, ablation of the parts)",
        "segm/AP",
        (
            Step("htc_tiny_ablation_cascade", "cascade, box and mask heads side by side", 36.5),
            Step(
                "htc_tiny_ablation_interleaved",
                "mask heads train on the boxes that their stage has refined",
                36.7,
                "htc_tiny_ablation_cascade",
            ),
            Step(
                "htc_tiny_ablation_flow",
                "mask features go from stage to stage",
                37.4,
                "htc_tiny_ablation_interleaved",
            ),
            Step("htc_tiny", "semantic branch: HTC", 38.0, "htc_tiny_ablation_flow"),
            Step(
                "htc_tiny_semantic_text",
                "semantic loss with the weight of the text: 1",
                None,
                "htc_tiny_ablation_flow",
            ),
            Step(
                "htc_tiny_semantic_alone",
                "semantic branch trained, its features given to no head",
                None,
                "htc_tiny_ablation_flow",
            ),
            Step(
                "htc_tiny_semantic_untaught",
                "semantic branch without its loss",
                None,
                "htc_tiny_ablation_flow",
            ),
            Step("htc_tiny_flow_long", "mask features from stage to stage, twice as long"),
            Step("htc_tiny_long", "HTC, twice as long", None, "htc_tiny_flow_long"),
        ),
    ),
    Chain(
        "HTC and the baselines",
        "mask AP on COCO test-dev, R-50-FPN, 20 epochs (paper, comparison of systems)",
        "segm/AP",
        (
            Step("mask_rcnn_tiny", "Mask R-CNN", 35.6),
            Step("cascade_mask_rcnn_tiny", "Cascade Mask R-CNN", 36.9, "mask_rcnn_tiny"),
            Step("htc_tiny", "HTC", 38.4, "cascade_mask_rcnn_tiny"),
        ),
    ),
    Chain(
        "MNC: shared features, training at once, five stages",
        "mAP^r at 0.5 on VOC 2012 val (SDS), VGG-16, all predicted with five stages (paper, table "
        "of the training strategies). Here step by step means gradients cut between the stages",
        "segm/AP50",
        (
            Step("mnc_tiny_unshared", "a network per stage, step by step", 60.2),
            Step(
                "mnc_tiny_step_by_step", "shared features, step by step", 60.5, "mnc_tiny_unshared"
            ),
            Step("mnc_tiny_3stage", "three stages, end to end", 62.6, "mnc_tiny_step_by_step"),
            Step("mnc_tiny", "five stages, end to end", 63.5, "mnc_tiny_3stage"),
            Step("mnc_tiny_detach", "five stages, boxes constant", None, "mnc_tiny"),
            Step("mnc_tiny_without_voting", "five stages, no mask voting", 62.5, "mnc_tiny"),
        ),
    ),
    Chain(
        "FCIS: parts and joint maps",
        "mAP^r at 0.5 on VOC 2012 val (SDS), R-101 (paper, table of the ablations)",
        "segm/AP50",
        (
            Step("fcis_tiny", "FCIS", 65.7),
            Step(
                "fcis_tiny_ablation_translation_invariant",
                "one part (translation-invariant)",
                52.5,
                "fcis_tiny",
            ),
            Step("fcis_tiny_ablation_separate", "maps of their own per task", 63.9, "fcis_tiny"),
            Step("fcis_tiny_equal", "FCIS, loss weights of the paper: 1, 1, 1", 65.7),
            Step("fcis_tiny_separate_equal", "own maps, these weights", 63.9, "fcis_tiny_equal"),
            Step("fcis_tiny_long", "FCIS, twice as long"),
            Step("fcis_tiny_separate_long", "own maps, twice as long", None, "fcis_tiny_long"),
        ),
    ),
    Chain(
        "FCIS: hardest regions, refined boxes",
        "mask AP on COCO test-dev, R-101 (paper, table of the sampling); the effect of the "
        "refined boxes is not published",
        "segm/AP",
        (
            Step("fcis_tiny", "FCIS", 29.2),
            Step("fcis_tiny_random_sampling", "random regions instead of OHEM", 28.8, "fcis_tiny"),
            Step("fcis_tiny_without_refinement", "refined boxes are not scored", None, "fcis_tiny"),
        ),
    ),
)
