"""Where the packages lie; metadata is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

MAPPED = {
    "mnc": "projects/MNC/mnc",
    "fcis": "projects/FCIS/fcis",
    "htc": "projects/HTC/htc",
    "d2ext.configs": "configs",
}
present = {name: path for name, path in MAPPED.items() if Path(path, "__init__.py").is_file()}
setup(
    packages=find_packages(include=["d2ext", "d2ext.*"]) + list(present),
    package_dir=present,
    package_data={"d2ext.configs": ["**/*.yaml", "**/*.py"]},
)
