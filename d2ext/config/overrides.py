"""The override grammar shared by yaml and lazy configs: `key=value` on the command line.

A value is read in the type of the setting it replaces: text stays text (`OUTPUT_DIR=2024`), one
entry is enough for a list (`DATASETS.TEST=shapes_val`). Everything else is a Python literal
(`1e-4`, `[1, 2]`), where `true`, `false` and `null` are understood too and words need no
quotes. A key that the config lacks is an error that lists the nearest ones; in lazy configs
`+key=value` adds it on purpose, and sets an existing one whatever its type.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from d2ext.config.defaults import get_cfg
from d2ext.config.values import convert, parse_value
from d2ext.errors import UserError

# The few settings that people change in every run, under their name in the other kind of config.
YAML_TO_LAZY = {
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.CHECKPOINT_KEEP": "train.checkpointer.max_to_keep",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.AMP.DTYPE": "train.amp.dtype",
    "SOLVER.SKIP_NONFINITE": "train.skip_nonfinite",
    "SOLVER.ACCUMULATION_STEPS": "train.accumulation_steps",
    "SOLVER.EMA_DECAY": "train.ema_decay",
    "SOLVER.FREEZE": "train.freeze",
    "SOLVER.LR_MULTIPLIERS": "optimizer.lr_multipliers",
    "SOLVER.BASE_LR": "optimizer.lr",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.DEVICE": "train.device",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "TEST.BEST_METRIC": "train.best_metric",
    "TEST.EARLY_STOPPING": "train.early_stopping",
    "TEST.METRICS": "dataloader.evaluator.metrics",
    "TEST.MAPR_IOUS": "dataloader.evaluator.mapr_ious",
    "TEST.MAPR_AREA": "dataloader.evaluator.mapr_area",
    "TEST.AUG.ENABLED": "train.test_aug.enabled",
    "TEST.AUG.MIN_SIZES": "train.test_aug.min_sizes",
    "TEST.AUG.MAX_SIZE": "train.test_aug.max_size",
    "TEST.AUG.FLIP": "train.test_aug.flip",
    "DATASETS.TRAIN": "dataloader.train.dataset",
    "DATASETS.TEST": "dataloader.test.dataset",
    "DATASETS.REGISTER": "dataloader.register",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "INPUT.COPY_PASTE.PROB": "dataloader.train.copy_paste.prob",
    "INPUT.COPY_PASTE.MAX_OBJECTS": "dataloader.train.copy_paste.max_objects",
    "INPUT.COPY_PASTE.MIN_VISIBLE": "dataloader.train.copy_paste.min_visible",
    "INPUT.MIN_MASK_AREA": "dataloader.train.mapper.min_area",
    "OUTPUT_DIR": "train.output_dir",
    "LOG_PERIOD": "train.log_period",
    "LOG_WRITERS": "train.log_writers",
    "SEED": "train.seed",
}
LAZY_TO_YAML = {lazy: yaml for yaml, lazy in YAML_TO_LAZY.items()}

# Paths, where "none" is no name but means that there is none.
_PATHS = ("MODEL.WEIGHTS", "train.init_checkpoint", "OUTPUT_DIR", "train.output_dir")
# Lazy settings that may be one name or a list of them.
_NAMES = ("dataloader.train.dataset", "dataloader.test.dataset")
_KEY_AND_VALUE = re.compile(r"\+?[A-Za-z_][\w.\-\[\]]*=")


class Override(NamedTuple):
    """One parsed override; `add` tells whether the key may be new, `text` is what was typed."""

    key: str
    raw: str
    add: bool
    text: str

    @property
    def value(self) -> Any:
        """The right-hand side without regard to the setting it is for."""
        return parse_value(self.raw)


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """Parse `key=value` words, also with spaces around `=`, and detectron2's older `KEY value`
    pairs, in any mixture.

    Raises:
        UserError: a word without `=` that is not followed by a value, or without a key.
    """
    overrides, words = [], list(arguments)
    while words:
        word = words.pop(0)
        if "=" in word:
            key, _, raw = word.partition("=")
        elif words and words[0].startswith("=") and (words[0] != "=" or len(words) > 1):
            key, raw = word, words.pop(0)[1:] or words.pop(0)
            word = f"{key}={raw}"
        elif words and not _KEY_AND_VALUE.match(words[0]):  # a path may contain "=" as well
            key, raw = word, words.pop(0)
            word = f"{key} {raw}"
        elif overrides and not overrides[-1].raw:  # KEY= VALUE
            joined = f"{overrides[-1].key}={word}"
            raise UserError(f"override '{overrides[-1].text} {word}': write it as {joined}")
        else:
            raise UserError(f"override '{word}' has no value; write it as {word}=VALUE")
        add = key.startswith("+")
        key = re.sub(r"\[(\d+)\]", r".\1", key.lstrip("+").strip())
        if not key:
            raise UserError(f"override '{word}' has no key; write it as KEY{word}")
        overrides.append(Override(key, raw, add, word))
    return overrides


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """` (nearest: a, b)`, or nothing when no name is similar."""
    by_lower = {n.lower(): n for n in names}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.6)
    if not matches:  # the same last part under another node is often what was meant
        leaf = name.rsplit(".", 1)[-1].lower()
        matches = [n for n in by_lower if n.rsplit(".", 1)[-1] == leaf][:count]
    return f" (nearest: {', '.join(by_lower[m] for m in matches)})" if matches else ""


# -------------------------------------------------------------------------------------------------
# yaml


def yaml_keys(node, prefix: str = "") -> list[str]:
    """All leaf keys of a CfgNode, as dotted paths."""
    keys = []
    for name, value in node.items():
        keys += yaml_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return keys


def apply_to_yaml(cfg, overrides: Sequence[Override]) -> None:
    """Set `overrides` in a CfgNode.

    Raises:
        UserError: unknown key or a value of the wrong type.
    """
    for o in overrides:
        key = LAZY_TO_YAML.get(o.key, o.key)
        node, (*groups, leaf) = cfg, key.split(".")
        for group in groups:
            node = node.get(group) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf not in node:
            raise UserError(
                f"override '{o.text}': no such key{nearest(key, yaml_keys(cfg))}"
                + ("; yaml configs take no new ones" if o.add else "")
            )
        old = node[leaf]
        if isinstance(old, dict):
            raise UserError(f"override '{o.text}': {key} is a group of keys, set one of them")
        value = _value(o, key, old)
        if isinstance(old, str) and value is None:
            value = ""
        if isinstance(value, list) and isinstance(old, tuple):
            value = tuple(value)
        node[leaf] = value


# -------------------------------------------------------------------------------------------------
# lazy


def lazy_keys(node, prefix: str = "") -> list[str]:
    """All leaf keys of a DictConfig or ListConfig as dotted paths; interpolations are leaves."""
    keys = []
    for name in range(len(node)) if OmegaConf.is_list(node) else node:
        child = _child(node, name, resolve=False)
        holds_groups = OmegaConf.is_list(child) and any(
            OmegaConf.is_config(_child(child, i, resolve=False)) for i in range(len(child))
        )
        if OmegaConf.is_dict(child) or holds_groups:
            keys += lazy_keys(child, f"{prefix}{name}.")
        elif name != "_target_":
            keys.append(f"{prefix}{name}")
    return keys


def _child(node, name, resolve: bool = True) -> Any:
    """One entry of a config node; `None` for a missing value or what cannot be resolved."""
    if OmegaConf.is_missing(node, name):
        return None
    if not resolve and OmegaConf.is_interpolation(node, name):
        return None
    try:
        return node[name]
    except OmegaConfBaseException:
        return None


def _entry(node, part: str) -> tuple[bool, Any]:
    """(whether `node` has an entry of that name or number, its name as an index of `node`)."""
    if OmegaConf.is_list(node):
        return (part.isdigit() and int(part) < len(node), int(part) if part.isdigit() else part)
    return OmegaConf.is_dict(node) and part in node.keys(), part


def apply_to_lazy(cfg, overrides: Sequence[Override]) -> None:
    """Set `overrides` in a DictConfig; numbers in a key are list indices.

    Raises:
        UserError: unknown key (unless added with `+`), path through a value, wrong type.
    """
    for o in overrides:
        key = YAML_TO_LAZY.get(o.key, o.key)
        if _is_yaml_key(key) and key.split(".")[0] not in cfg:
            raise UserError(
                f"override '{o.text}': {key} is a key of yaml configs, and this one is lazy; find "
                f"its name in the config file{nearest(key, lazy_keys(cfg))}"
            )
        node, parts = cfg, key.split(".")
        for depth, part in enumerate(parts):
            found, name = _entry(node, part)
            if not found or depth == len(parts) - 1:
                break
            node = _child(node, name)
        if found:
            old = _child(node, name)
            if OmegaConf.is_dict(old) and o.raw.strip().lower() in ("null", "none"):
                _remove(cfg, node, name, key)
                continue
            if key in _NAMES and isinstance(old, str):
                old = [old]
            _set(node, name, o.value if o.add or "${" in o.raw else _value(o, key, old), o)
            continue
        if not OmegaConf.is_dict(node) and node is not None:
            raise UserError(f"override '{o.text}': {_no_entry(node, parts[:depth], part)}")
        if not o.add:
            raise UserError(
                f"override '{o.text}': no such key{nearest(key, lazy_keys(cfg))}; "
                f"+{key}=VALUE adds a new one"
            )
        try:
            OmegaConf.update(cfg, key, o.value, merge=False)
        except OmegaConfBaseException as error:
            raise UserError(f"override '{o.text}': {str(error).splitlines()[0]}") from error


def _is_yaml_key(key: str) -> bool:
    """Whether a key starts as one of yaml configs does; nothing would read it in a lazy one."""
    return key.split(".")[0] in get_cfg()


def _set(node, name, value: Any, o: Override) -> None:
    try:
        node[name] = value
    except OmegaConfBaseException as error:  # a reference that is no "${group.key}"
        raise UserError(f"override '{o.text}': {str(error).splitlines()[0]}") from error


def _remove(cfg, node, name, key: str) -> None:
    """Set a part of the model, or another group, to null, and with it what refers into it."""
    inside = "${" + key + "."
    for other in lazy_keys(cfg):
        *groups, leaf = other.split(".")
        owner = cfg
        for group in groups:
            owner = _child(owner, _entry(owner, group)[1])
        leaf = _entry(owner, leaf)[1]
        plain: Any = OmegaConf.to_container(owner, resolve=False)
        if OmegaConf.is_interpolation(owner, leaf) and inside in str(plain[leaf]):
            owner[leaf] = None
    node[name] = None


def _no_entry(node, path: Sequence[str], part: str) -> str:
    path = ".".join(path)
    if not OmegaConf.is_list(node):
        return f"{path} is a value, not a group of keys"
    return f"{path} is a list of {len(node)}, which has no entry '{part}'"


def _value(o: Override, key: str, old: Any) -> Any:
    """The override's value in the type of the setting `old`."""
    if key in _PATHS and o.raw.strip().lower() in ("none", "null"):
        return ""
    value, wanted = convert(o.raw, old)
    if wanted == "a group of keys":
        raise UserError(f"override '{o.text}': {key} is {wanted}, set one of them")
    if wanted:
        shown = OmegaConf.to_container(old) if OmegaConf.is_config(old) else old
        raise UserError(f"override '{o.text}': {key} takes {wanted} such as {shown!r}")
    return value
