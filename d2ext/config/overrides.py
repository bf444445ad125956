"""The override grammar shared by yaml and lazy configs: ``key=value`` on the command line.

Values are Python literals (``0.01``, ``[1, 2]``, ``('a', 'b')``, ``None``); ``true``, ``false`` and
``null`` are understood as well; anything else is a string. A key that the config does not have is an
error that lists the nearest ones; ``+key=value`` adds it on purpose (lazy configs only).
"""

import ast
import difflib
from typing import Any, Iterable, List, NamedTuple, Sequence

from omegaconf import OmegaConf

from d2ext.errors import UserError

# The few settings that people change in every run, under their name in the other kind of config.
YAML_TO_LAZY = {
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.BASE_LR": "optimizer.lr",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.DEVICE": "train.device",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "DATASETS.TRAIN": "dataloader.train.dataset",
    "DATASETS.TEST": "dataloader.test.dataset",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "OUTPUT_DIR": "train.output_dir",
    "LOG_PERIOD": "train.log_period",
    "SEED": "train.seed",
}
LAZY_TO_YAML = {lazy: yaml for yaml, lazy in YAML_TO_LAZY.items()}

_WORDS = {"true": True, "false": False, "null": None, "none": None}


class Override(NamedTuple):
    """One parsed override; ``add`` tells whether the key may be new."""

    key: str
    value: Any
    add: bool
    text: str


def parse_value(text: str) -> Any:
    """The value of the right-hand side of an override."""
    stripped = text.strip()
    if stripped.lower() in _WORDS:
        return _WORDS[stripped.lower()]
    try:
        return ast.literal_eval(stripped)
    except (ValueError, SyntaxError):
        pass
    if stripped[:1] in "[(" and stripped[-1:] in "])":  # [a,b]: a list of bare words
        inner = stripped[1:-1].strip()
        return [parse_value(part) for part in inner.split(",") if part.strip()] if inner else []
    return stripped


def parse_overrides(arguments: Sequence[str]) -> List[Override]:
    """Parse ``key=value`` words, and detectron2's older ``KEY value`` pairs, in any mixture.

    Raises:
        UserError: a word without ``=`` that is not followed by a value.
    """
    overrides, words = [], list(arguments)
    while words:
        word = words.pop(0)
        if "=" in word:
            key, _, value = word.partition("=")
        elif words and "=" not in words[0]:
            key, value = word, words.pop(0)
            word = f"{key} {value}"
        else:
            raise UserError(f"override '{word}' has no value; write it as {word}=VALUE")
        add = key.startswith("+")
        overrides.append(Override(key.lstrip("+").strip(), parse_value(value), add, word))
    return overrides


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """`` (nearest: a, b)``, or nothing when no name is similar."""
    names = list(names)
    matches = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    if not matches:  # the same last part under another node is often what was meant
        leaf = name.rsplit(".", 1)[-1].lower()
        matches = [n for n in names if n.rsplit(".", 1)[-1].lower() == leaf][:count]
    return f" (nearest: {', '.join(matches)})" if matches else ""


# ---------------------------------------------------------------------------------------------------


def yaml_keys(node, prefix: str = "") -> List[str]:
    """All leaf keys of a CfgNode, as dotted paths."""
    keys = []
    for name, value in node.items():
        if hasattr(value, "merge_from_list"):
            keys += yaml_keys(value, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def apply_to_yaml(cfg, overrides: Sequence[Override]) -> None:
    """Set ``overrides`` in a CfgNode.

    Raises:
        UserError: unknown key or a value of the wrong type.
    """
    for o in overrides:
        key = LAZY_TO_YAML.get(o.key, o.key)
        node, parts = cfg, key.split(".")
        for part in parts[:-1]:
            node = node.get(part) if hasattr(node, "merge_from_list") else None
        if not hasattr(node, "merge_from_list") or parts[-1] not in node:
            raise UserError(f"override '{o.text}': no such key{nearest(key, yaml_keys(cfg))}")
        old, value = node[parts[-1]], o.value
        if hasattr(old, "merge_from_list"):
            raise UserError(f"override '{o.text}': {key} is a group of keys, set one of them")
        if isinstance(old, str) and value is None:
            value = ""  # MODEL.WEIGHTS=none
        _check_type(o._replace(value=value), key, old)
        if isinstance(old, (tuple, list)):
            value = type(old)([value] if isinstance(value, str) else value)  # DATASETS.TRAIN=name
        node[parts[-1]] = float(value) if isinstance(old, float) else value


def lazy_keys(cfg, prefix: str = "") -> List[str]:
    """All leaf keys of a DictConfig, as dotted paths; interpolations are not followed."""
    keys = []
    for name in cfg:
        child = cfg._get_node(name)
        if OmegaConf.is_dict(child) and not child._is_interpolation() and not child._is_none():
            keys += lazy_keys(child, f"{prefix}{name}.")
        elif name != "_target_":
            keys.append(f"{prefix}{name}")
    return keys


def apply_to_lazy(cfg, overrides: Sequence[Override]) -> None:
    """Set ``overrides`` in a DictConfig.

    Raises:
        UserError: unknown key (unless added with ``+``), path through a value, wrong type.
    """
    missing = object()
    for o in overrides:
        key = YAML_TO_LAZY.get(o.key, o.key)
        parent_key, _, leaf = key.rpartition(".")
        parent = OmegaConf.select(cfg, parent_key, default=missing) if parent_key else cfg
        if OmegaConf.is_list(parent) and leaf.isdigit() and int(leaf) < len(parent):
            parent[int(leaf)] = o.value
            continue
        known = OmegaConf.is_dict(parent) and leaf in parent
        if not known and not o.add:
            raise UserError(
                f"override '{o.text}': no such key{nearest(key, lazy_keys(cfg))}; "
                f"+{key}=VALUE adds a new one"
            )
        if parent is not missing and not OmegaConf.is_dict(parent):
            raise UserError(f"override '{o.text}': {parent_key} is a value, not a group of keys")
        if known:
            _check_type(o, key, parent[leaf])
        value = o.value
        if known and OmegaConf.is_list(parent[leaf]) and isinstance(value, str):
            value = [value]
        OmegaConf.update(cfg, key, list(value) if isinstance(value, tuple) else value, merge=False)


def _check_type(o: Override, key: str, old: Any) -> None:
    """Numbers stay numbers, text text, groups groups; in lazy configs ``None`` goes with everything."""
    new, kind = o.value, None
    if OmegaConf.is_dict(old) and not isinstance(new, dict):
        raise UserError(f"override '{o.text}': {key} is a group of keys, set one of them")
    if old is None or (new is None and not isinstance(old, (int, float))):
        return
    if isinstance(old, bool) and not isinstance(new, bool):
        kind = "true or false"
    elif isinstance(old, int) and not isinstance(old, bool) and not _is_number(new, int):
        kind = "a whole number"
    elif isinstance(old, float) and not _is_number(new, (int, float)):
        kind = "a number"
    elif (OmegaConf.is_list(old) or isinstance(old, (list, tuple))) and not isinstance(new, (list, tuple, str)):
        kind = "a list"
    elif isinstance(old, str) and not isinstance(new, (str, list, tuple)):
        kind = "text"
    if kind:
        shown = OmegaConf.to_container(old) if OmegaConf.is_config(old) else old
        raise UserError(f"override '{o.text}': {key} takes {kind} such as {shown!r}")


def _is_number(value: Any, types) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)
