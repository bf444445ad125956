"""Where the packages of this repository's projects are imported from: `d2ext.projects.htc`.

In the repository they lie in `projects/`, which is put on the path of this package; in a wheel they
lie beside this file. Nothing else of d2ext knows them, see `d2ext.config.projects`.
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
if (_ROOT / "setup.py").is_file():
    __path__ += [str(path.parents[1]) for path in sorted(_ROOT.glob("projects/*/*/__init__.py"))]
