"""Find and load config files of both kinds.

``load_config("x.yaml")`` returns a detectron2 ``CfgNode``, ``load_config("x.py")`` an omegaconf
``DictConfig``; overrides are written the same way for both. A yaml file that holds a saved lazy config
(``config.yaml`` in the output folder of such a run) is recognised and loaded as lazy.
"""

from pathlib import Path
from typing import Any, Sequence, Union

import yaml
from omegaconf import DictConfig, OmegaConf

from d2ext.config.defaults import get_cfg
from d2ext.config.overrides import (
    apply_to_lazy,
    apply_to_yaml,
    nearest,
    parse_overrides,
    yaml_keys,
)
from d2ext.errors import UserError
from detectron2.config import CfgNode, LazyConfig

_KINDS = (".yaml", ".yml", ".py")


def config_roots() -> list:
    """Folders that may hold the shared configs: the checkout's first, then the packaged copy."""
    package = Path(__file__).resolve().parents[1]
    return [root for root in (package.parent / "configs", package / "configs") if root.is_dir()]


def get_config_file(name: str) -> str:
    """Path of a shared config such as ``common/train.py`` or ``mask_rcnn_tiny.yaml``.

    Raises:
        UserError: there is none of that name.
    """
    for root in config_roots():
        if (root / name).is_file():
            return str(root / name)
    names = [str(p.relative_to(r)) for r in config_roots() for k in _KINDS for p in r.rglob("*" + k)]
    raise UserError(f"no shared config '{name}'{nearest(name, names)}")


def get_config(name: str) -> Any:
    """Load a shared lazy config without overrides; for use inside other lazy configs."""
    return LazyConfig.load(get_config_file(name))


def load_config(path: Union[str, Path], overrides: Sequence[str] = ()) -> Union[CfgNode, DictConfig]:
    """Load a config and apply overrides to it.

    Args:
        path: a ``.yaml`` or ``.py`` file.
        overrides: ``key=value`` strings (``KEY VALUE`` pairs are accepted too); see
            :mod:`d2ext.config.overrides`.

    Returns:
        A ``CfgNode`` for a yaml config, a ``DictConfig`` for a lazy one.

    Raises:
        UserError: one line that names the file or the key, with the nearest valid names.
    """
    path = str(path)
    if not Path(path).is_file():
        folder = Path(path).parent
        names = [str(p) for p in sorted(folder.iterdir()) if p.suffix in _KINDS] if folder.is_dir() else []
        raise UserError(f"config file '{path}' does not exist{nearest(path, names)}")
    if Path(path).suffix not in _KINDS:
        raise UserError(f"config file '{path}' must end in .yaml or .py")
    parsed = parse_overrides(overrides)
    if path.endswith(".py") or _is_saved_lazy_config(path):
        cfg = _load_lazy(path)
        apply_to_lazy(cfg, parsed)
    else:
        cfg = _load_yaml(path)
        apply_to_yaml(cfg, parsed)
    return cfg


def is_lazy(cfg) -> bool:
    """Whether ``cfg`` is a lazy config."""
    return isinstance(cfg, DictConfig)


def _is_saved_lazy_config(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as f:
            root = yaml.compose(f, Loader=yaml.SafeLoader)  # structure only: builds no object
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    if not isinstance(root, yaml.MappingNode):
        return False
    return {"model", "train"} <= {key.value for key, _ in root.value}


def _load_lazy(path: str) -> DictConfig:
    try:
        cfg = LazyConfig.load(path)
    except SyntaxError as error:
        cause = error.__cause__ or error
        raise UserError(f"config file '{path}', line {cause.lineno}: {cause.msg}") from error
    except (ImportError, KeyError, AttributeError, NameError, TypeError, ValueError) as error:
        raise UserError(f"config file '{path}': {type(error).__name__}: {_one_line(error)}") from error
    absent = {"model", "dataloader", "optimizer", "lr_multiplier", "train"} - set(cfg)
    if absent:
        raise UserError(f"config file '{path}' does not define {', '.join(sorted(absent))}")
    OmegaConf.set_struct(cfg, False)
    return cfg


def _load_yaml(path: str) -> CfgNode:
    cfg = get_cfg()
    try:
        cfg.merge_from_file(path)
    except KeyError as error:
        key = _one_line(error).strip("'\"").replace("Non-existent config key: ", "")
        raise UserError(
            f"config file '{path}': no such key {key}{nearest(key, yaml_keys(cfg))}"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "is not valid yaml"
        raise UserError(f"config file '{path}'{where}: {problem}") from error
    except (ValueError, AssertionError, AttributeError, OSError) as error:
        raise UserError(f"config file '{path}': {_one_line(error)}") from error
    return cfg


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
