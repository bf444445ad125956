#!/usr/bin/env python3
"""Write docs/config_reference.md: every yaml key of this collection with its name in lazy configs,
its default, its meaning and where it comes from, read from the functions that define the keys.

dev/write_config_reference.py
"""

import ast
import inspect
import re
import textwrap
from pathlib import Path

from d2ext.config import add_d2ext_config, add_modeling_config, get_cfg, load_projects
from d2ext.config.augmentation import add_augmentation_config
from d2ext.config.overrides import YAML_TO_LAZY
from d2ext.config.projects import config_functions
from d2ext.config.recipe import add_recipe_config

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/config_reference.md"
HEAD = """# Reference of config keys

Written by `dev/write_config_reference.py` from the functions that define the keys. d2ext and its
projects add these keys to
[detectron2's own](https://detectron2.readthedocs.io/en/latest/modules/config.html#config-references);
`d2ext.config.get_cfg()` has both. The last column is the paper or program that a setting comes
from, where the code names one. [Configs](configs.md) tells how keys are set.
"""
# Names in lazy configs that no other table has.
LAZY = {
    "INPUT.SEMANTIC": "dataloader.train.mapper.semantic",
    "SOLVER.OPTIMIZER": "optimizer.name",
    "SOLVER.LAYER_DECAY": "optimizer.layer_decay",
    "SOLVER.DECAY_MATRICES_ONLY": "optimizer.decay_matrices_only",
    "SOLVER.COSINE_END": "lr_multiplier.end",
    "MODEL.SLIM_RESNET.STEM_CHANNELS": "model.backbone.stem_channels",
    "MODEL.SLIM_RESNET.STAGE_CHANNELS": "model.backbone.stage_channels",
    "MODEL.SLIM_RESNET.STAGE_BLOCKS": "model.backbone.stage_blocks",
    "MODEL.CAFFE_RPN.MATCH_ZERO_OVERLAP": "model.proposal_generator.match_zero_overlap",
    "MODEL.CAFFE_RPN.NORMALIZE_BOX_BY_SAMPLED": "model.proposal_generator.normalize_box_by_sampled",
    "MODEL.CAFFE_RPN.SCALE_MIN_SIZE": "model.proposal_generator.scale_min_size",
    "MODEL.CAFFE_RPN.CLAMP_DELTAS": "model.proposal_generator.box2box_transform",
    "MODEL.SOFT_NMS.METHOD": "model.roi_heads.soft_nms",
    "MODEL.SOFT_NMS.SIGMA": "model.roi_heads.soft_nms_sigma",
    "MODEL.SOFT_NMS.MIN_SCORE": "model.roi_heads.soft_nms_min_score",
    "MODEL.TIMM.NAME": "model.backbone.bottom_up.name",
    "MODEL.TIMM.PRETRAINED": "model.backbone.bottom_up.pretrained",
    "MODEL.TIMM.OUT_FEATURES": "model.backbone.bottom_up.out_features",
    "MODEL.TIMM.DROP_PATH": "model.backbone.bottom_up.drop_path",
    "MODEL.TIMM.FREEZE_AT": "model.backbone.bottom_up.freeze_at",
    "MODEL.TIMM.NORM": "model.backbone.bottom_up.norm",
    "MODEL.TIMM.OUT_NORM": "model.backbone.bottom_up.out_norm",
    "MODEL.TIMM.OUTPUT_STRIDE": "model.backbone.bottom_up.output_stride",
    "MODEL.TIMM.GLOBAL_BLOCKS": "model.backbone.bottom_up.global_blocks",
    "MODEL.TIMM.POSITIONS": "model.backbone.bottom_up.positions",
    "MODEL.TIMM.CHECKPOINTING": "model.backbone.bottom_up.checkpointing",
    "MODEL.CAFFE_RESNET.CEIL_POOL": "model.backbone.ceil_pool",
    "MODEL.MNC.CATEGORY_HEAD": "model.roi_heads.category_head",
    "MODEL.HTC.SEMANTIC.NUM_CONV": "model.roi_heads.semantic_head.num_conv",
    "MODEL.HTC.SEMANTIC.CONV_DIM": "model.roi_heads.semantic_head.conv_dim",
}
# Entries of the list of augmentations of a lazy config.
CLASSES = {
    "INPUT.LSJ": "LargeScaleJitter",
    "INPUT.COLOR_JITTER": "ColorJitter",
    "INPUT.ROTATE_90": "RandomRotation(angle=[0, 90, 180, 270], sample_style='choice')",
}
# A training on a CPU has another.
MACHINE = {"MODEL.DEVICE": "`cuda`, or `cpu` where there is no GPU"}
_SOURCE = re.compile(r"\(([^()]*\b(?:sections?|paper|releases?|Caffe|MMDetection)\b[^()]*)\)")


def functions() -> list:
    """Those that add keys, in the order of the page."""
    load_projects()
    projects = [f for f in config_functions() if f.__module__.startswith("d2ext.projects.")]
    shared = [add_d2ext_config, add_augmentation_config, add_recipe_config, add_modeling_config]
    return shared + sorted(projects, key=lambda f: f.__module__)


def explained(function) -> dict[str, str]:
    """Full key -> the comment above its assignment, or above those that it follows directly."""
    text = textwrap.dedent(inspect.getsource(function))
    lines, comment, last, found = text.splitlines(), "", 0, {}
    groups = {"cfg": ""}
    for node in ast.parse(text).body[0].body:
        above = _comment_above(lines, node.lineno)
        if above or node.lineno != last + 1:
            comment = above
        last = node.end_lineno
        if isinstance(node, ast.Assign):
            for key in _keys(node, groups):
                found[key] = comment
    return found


def _comment_above(lines: list[str], number: int) -> str:
    words = []
    for line in reversed(lines[: number - 1]):
        if not line.strip().startswith("#"):
            break
        words.insert(0, line.strip().removeprefix("#").strip())
    return " ".join(words)


def _keys(node: ast.Assign, groups: dict[str, str]) -> list[str]:
    """What an assignment defines; names that it gives to groups are noted."""
    paths = [ast.unparse(target) for target in node.targets]
    name = next((p for p in paths if "." in p), "")
    head, _, rest = name.partition(".")
    if head not in groups:
        return []
    key = f"{groups[head]}{rest}"
    if not isinstance(node.value, ast.Call):
        return [key]
    groups.update({p: f"{key}." for p in paths if "." not in p})
    inner = node.value.args[0].keys if node.value.args else []
    return [f"{key}.{x.value}" for x in inner]


def switches() -> dict[str, str]:
    """Yaml key -> what the tables in the READMEs of the projects call it in lazy configs."""
    found = {}
    for page in ROOT.glob("projects/*/README.md"):
        text = page.read_text(encoding="utf-8").partition("\n## Switches")[2].partition("\n## ")[0]
        under = "model.roi_heads." if "under `model.roi_heads`" in text else "model."
        for keys, lazy in re.findall(r"^\| (`[A-Z_`, .0-9]+`) \| (.*?) \|", text, re.MULTILINE):
            keys = re.findall(r"`([^`]+)`", keys)
            names = re.sub(r"`([a-z]\w*[._]?[^`]*)`(?! for off)", rf"`{under}\1`", lazy).split(", ")
            names = names if len(names) == len(keys) > 1 else [", ".join(names)] * len(keys)
            found |= {f"MODEL.{page.parent.name}.{key}": name for key, name in zip(keys, names)}
    return found


def lazy_name(key: str, tables: dict[str, str]) -> str:
    """How a lazy config says it, in Markdown."""
    for group, name in CLASSES.items():
        if key.startswith(group):
            return f"`{name}` in `dataloader.train.mapper.augmentations`"
    if key.startswith("RECIPE."):
        return f"`{key.lower()}`"
    plain = YAML_TO_LAZY.get(key) or LAZY.get(key)
    return f"`{plain}`" if plain else tables.get(key, "")


def default(key: str, cfg) -> str:
    """The value of a fresh config, in Markdown."""
    for part in key.split("."):
        cfg = cfg[part]
    return MACHINE.get(key, f"`{cfg!r}`")


def rows() -> dict[str, list[tuple[str, str, str, str, str]]]:
    """File -> key, lazy name, default, meaning and source of each of its keys."""
    adders, tables, found = functions(), switches(), {}
    cfg = get_cfg()
    for function in adders:
        path = Path(inspect.getsourcefile(function)).resolve().relative_to(ROOT)
        for key, text in explained(function).items():
            source = "; ".join(dict.fromkeys(_SOURCE.findall(text)))
            row = (f"`{key}`", lazy_name(key, tables), default(key, cfg), text, source)
            found.setdefault(str(path), []).append(row)
    return found


def page() -> str:
    """The page, in Markdown."""
    text = HEAD
    for path, lines in rows().items():
        text += f"\n## {path}\n\nDefined in [{path}](../{path}).\n\n"
        text += "| yaml | lazy | default | meaning | source |\n|---|---|---|---|---|\n"
        for row in lines:
            text += "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n"
    return text


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}: {sum(map(len, rows().values()))} keys")


if __name__ == "__main__":
    main()
