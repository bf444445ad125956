"""Configs of both kinds, yaml and lazy python, through one function and one override grammar."""

from d2ext import compat

compat.require_detectron2()
compat.announce_optimizer()

from d2ext.config import paths as _paths  # noqa: F401  registers d2ext://
from d2ext.config.defaults import add_d2ext_config, get_cfg
from d2ext.config.find import find_config
from d2ext.config.load import get_config, get_config_file, is_lazy, load_config
from d2ext.config.modeling import add_modeling_config
from d2ext.config.projects import load_projects, project_configs, register_config
from d2ext.config.validate import check_registered_names

__all__ = [
    "add_d2ext_config",
    "add_modeling_config",
    "check_registered_names",
    "find_config",
    "get_cfg",
    "get_config",
    "get_config_file",
    "is_lazy",
    "load_config",
    "load_projects",
    "project_configs",
    "register_config",
]
