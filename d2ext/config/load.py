"""Find and load config files of both kinds.

`load_config("x.yaml")` returns a detectron2 `CfgNode`, `load_config("x.py")` an omegaconf
`DictConfig`; overrides are written the same way for both. A yaml file that holds a saved lazy
config (`config.yaml` in the output folder of such a run) is recognised and loaded as lazy.

Reading a yaml file runs nothing. A `.py` file is a program, and a lazy config of either kind
names in `_target_` what is called when it is used.
"""

import builtins
import io
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from d2ext.config.projects import load_projects, with_present_names
from d2ext.config.values import kind_of
from d2ext.errors import UserError

from detectron2.config import CfgNode, LazyConfig

_KINDS = (".yaml", ".yml", ".py")
LAZY_NODES = {"model", "dataloader", "optimizer", "lr_multiplier", "train"}


def config_roots() -> list[Path]:
    """Folders that may hold the shared configs: the checkout's first, then the packaged copy."""
    package = Path(__file__).resolve().parents[1]
    return [root for root in (package.parent / "configs", package / "configs") if root.is_dir()]


def get_config_file(name: str) -> str:
    """Path of a shared config such as `common/train.py` or `mask_rcnn_tiny.yaml`.

    Raises:
        UserError: there is none of that name.
    """
    for root in config_roots():
        if (root / name).is_file():
            return str(root / name)
    names = [str(p.relative_to(r)) for r in config_roots() for p in _config_files(r.rglob("*"))]
    raise UserError(f"no shared config '{name}'{nearest(name, names)}")


def _config_files(paths) -> list[Path]:
    return sorted(p for p in paths if p.suffix in _KINDS and p.name != "__init__.py")


def get_config(name: str) -> Any:
    """Load a shared lazy config without overrides; for use inside other lazy configs."""
    return LazyConfig.load(get_config_file(name))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CfgNode | DictConfig:
    """Load a config and apply overrides to it.

    Args:
        path: a `.yaml` or `.py` file.
        overrides: `key=value` strings (`KEY VALUE` pairs are accepted too); see
            `d2ext.config.overrides`.

    Returns:
        A `CfgNode` for a yaml config, a `DictConfig` for a lazy one.

    Raises:
        UserError: one line that names the file or the key, with the nearest valid names.
    """
    path = str(path)
    if not Path(path).is_file():
        folder = Path(path).parent
        names = [str(p) for p in _config_files(folder.iterdir())] if folder.is_dir() else []
        raise UserError(f"config file '{path}' does not exist{nearest(path, names)}")
    if Path(path).suffix not in _KINDS:
        raise UserError(f"config file '{path}' must end in .yaml or .py")
    parsed = parse_overrides(overrides)
    load_projects()  # so that their keys and names are known
    if path.endswith(".py") or _is_saved_lazy_config(path):
        cfg = _load_lazy(path)
        apply_to_lazy(cfg, parsed)
    else:
        cfg = _load_yaml(path)
        apply_to_yaml(cfg, parsed)
    return cfg


def is_lazy(cfg) -> bool:
    """Whether `cfg` is a lazy config."""
    return isinstance(cfg, DictConfig)


def _is_saved_lazy_config(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as f:
            root = yaml.compose(f, Loader=yaml.SafeLoader)  # structure only: builds no object
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # whoever loads it as yaml says what is wrong
    except RecursionError as error:
        raise UserError(f"config file '{path}' has too many brackets inside each other") from error
    if not isinstance(root, yaml.MappingNode):
        return False
    return {"model", "train"} <= {key.value for key, _ in root.value}


def _load_lazy(path: str) -> Any:
    # detectron2 replaces this function while it loads, and leaves it replaced after an error.
    original_import = builtins.__import__
    try:
        cfg = LazyConfig.load(path) if path.endswith(".py") else _load_saved_lazy(path)
    except yaml.YAMLError as error:
        raise _yaml_fault(path, error) from error
    except SyntaxError as error:
        cause = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
        named = re.search(r"[Cc]onfig file (.+) has syntax error", str(error))
        raise UserError(
            f"config file '{named[1] if named else path}', line {cause.lineno}: {cause.msg}"
        ) from error
    except Exception as error:  # the file is a program, which may fail in any way
        reason = _one_line(error)
        if not isinstance(error, UserError):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"config file '{path}'{_line_in(path, error)}: {reason}") from error
    finally:
        builtins.__import__ = original_import
    absent = LAZY_NODES - set(cfg)
    if absent:
        raise UserError(f"config file '{path}' does not define {', '.join(sorted(absent))}")
    OmegaConf.set_struct(cfg, False)
    return cfg


def _load_saved_lazy(path: str) -> Any:
    with open(path, encoding="utf-8") as f:
        text = io.StringIO(with_present_names(f.read()))
    text.name = path  # for messages
    # Names of classes and functions of imported modules are understood, but nothing is called.
    content = yaml.load(text, Loader=yaml.FullLoader)
    return OmegaConf.create(content, flags={"allow_objects": True})


def _yaml_fault(path: str, error: yaml.YAMLError) -> UserError:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"'{mark.name}', line {mark.line + 1}" if mark else f"'{path}'"  # or a base of it
    if isinstance(error, yaml.constructor.ConstructorError):
        problem = f"{problem}; yaml configs run no code, write the value itself"
    return UserError(f"config file {where}: {problem or 'is not valid yaml'}")


def _line_in(path: str, error: BaseException) -> str:
    """` , line N` of `path` where the error came up, if it did there."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    return f", line {lines[-1]}" if lines else ""


def _load_yaml(path: str) -> CfgNode:
    cfg = get_cfg()
    try:
        cfg.merge_from_file(path, allow_unsafe=False)
    except KeyError as error:
        key = _one_line(error).strip("'\"").replace("Non-existent config key: ", "")
        raise UserError(
            f"config file '{path}': no such key {key}{nearest(key, [*cfg, *yaml_keys(cfg)])}"
        ) from error
    except yaml.YAMLError as error:
        raise _yaml_fault(path, error) from error
    except FileNotFoundError as error:
        raise UserError(
            f"config file '{path}': its _BASE_ '{error.filename}' does not exist"
        ) from error
    except UserError as error:  # a shipped base that there is not
        raise UserError(f"config file '{path}', _BASE_: {error}") from error
    except RecursionError as error:
        raise UserError(f"config file '{path}': its _BASE_ leads back to itself") from error
    except (TypeError, AttributeError) as error:
        raise UserError(f"config file '{path}' is not a list of 'KEY: value' lines") from error
    except (ValueError, AssertionError, OSError) as error:
        raise UserError(f"config file '{path}': {_mismatch(error) or _one_line(error)}") from error
    return cfg


def _mismatch(error: BaseException) -> str:
    """A shorter text for yacs' type mismatch, which quotes whole groups of keys."""
    named = re.search(r"Type mismatch .*config key: (\S+)", _one_line(error))
    if not named:
        return ""
    old = get_cfg()
    for part in named[1].split("."):
        old = old[part]
    if isinstance(old, dict):
        return f"{named[1]} is a group of keys, set one of them"
    point = " with a decimal point" if isinstance(old, float) else ""
    return f"{named[1]} takes {kind_of(old)}{point} such as {old!r}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
