"""Check a yaml config's names against detectron2's registries before anything is built."""

from d2ext.config.overrides import nearest
from d2ext.errors import UserError

# Config key -> name of the registry that must know its value.
_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": "META_ARCH_REGISTRY",
    "MODEL.BACKBONE.NAME": "BACKBONE_REGISTRY",
    "MODEL.PROPOSAL_GENERATOR.NAME": "PROPOSAL_GENERATOR_REGISTRY",
    "MODEL.RPN.HEAD_NAME": "RPN_HEAD_REGISTRY",
    "MODEL.ANCHOR_GENERATOR.NAME": "ANCHOR_GENERATOR_REGISTRY",
    "MODEL.ROI_HEADS.NAME": "ROI_HEADS_REGISTRY",
    "MODEL.ROI_BOX_HEAD.NAME": "ROI_BOX_HEAD_REGISTRY",
    "MODEL.ROI_MASK_HEAD.NAME": "ROI_MASK_HEAD_REGISTRY",
    "MODEL.ROI_KEYPOINT_HEAD.NAME": "ROI_KEYPOINT_HEAD_REGISTRY",
    "MODEL.SEM_SEG_HEAD.NAME": "SEM_SEG_HEADS_REGISTRY",
}
_UNREGISTERED = {"", "PrecomputedProposals"}  # detectron2 handles these before it looks them up
_BOX_HEAD_USERS = ("StandardROIHeads", "CascadeROIHeads")  # others do without a name


def check_registered_names(cfg) -> None:
    """Raise a `UserError` for the first name that no registry knows, with the nearest ones."""
    from detectron2 import modeling
    from detectron2.modeling import anchor_generator, proposal_generator, roi_heads

    places = (modeling, proposal_generator, roi_heads, anchor_generator)
    for key, registry_name in _REGISTRIES.items():
        registry = next(getattr(p, registry_name) for p in places if hasattr(p, registry_name))
        value = cfg
        for part in key.split("."):
            value = value[part]
        needed = key == "MODEL.ROI_BOX_HEAD.NAME" and cfg.MODEL.ROI_HEADS.NAME in _BOX_HEAD_USERS
        if value in registry or (value in _UNREGISTERED and not needed):
            continue
        known = [name for name, _ in registry]
        raise UserError(
            f"{key} is '{value}', which is not registered{nearest(value, known)}; "
            "if it belongs to a project, install that project or import its package first"
        )
    name, every = cfg.MODEL.ROI_HEADS.NAME, roi_heads.ROI_HEADS_REGISTRY
    heads = every.get(name) if name in every else None
    if cfg.MODEL.SOFT_NMS.METHOD and not getattr(heads, "takes_soft_nms", False):
        raise UserError(
            f"MODEL.SOFT_NMS.METHOD has no effect in {name}; ReproducibleCascadeROIHeads and "
            "HTCROIHeads have it"
        )
