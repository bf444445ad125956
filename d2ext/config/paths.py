"""Addresses of the form `d2ext://weights/x.pth`: files shipped in `configs/`, wherever it lies.

Works wherever detectron2 opens a path: `MODEL.WEIGHTS`, `train.init_checkpoint`, checkpointers,
and `_BASE_` of a yaml config: that is how a project outside of this repository builds on them.
"""

from iopath.common.file_io import PathHandler

from d2ext.config.load import get_config_file
from d2ext.errors import UserError

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

PREFIX = "d2ext://"


class ShippedFileHandler(PathHandler):
    """Resolve `d2ext://NAME` to the file NAME below the shared configs."""

    def _get_supported_prefixes(self):
        return [PREFIX]

    def _get_local_path(self, path, force=False, **kwargs):
        return get_config_file(path[len(PREFIX) :])

    def _isfile(self, path, **kwargs):
        try:
            self._get_local_path(path)
        except UserError:
            return False
        return True

    _exists = _isfile

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        return open(self._get_local_path(path), mode, buffering)


_load_yaml_with_base = CfgNode.load_yaml_with_base.__func__


def _load_with_shipped_base(cls, filename, allow_unsafe=False):
    """Takes `_BASE_: d2ext://NAME`, before which fvcore puts the folder of the config."""
    _, shipped, name = filename.partition(PREFIX)
    filename = get_config_file(name) if shipped else filename
    return _load_yaml_with_base(cls, filename, allow_unsafe=allow_unsafe)


PathManager.register_handler(ShippedFileHandler(), allow_override=True)
CfgNode.load_yaml_with_base = classmethod(_load_with_shipped_base)
