"""Two processes compute what one does, also where the network leaves pyramid levels unread."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def train(project, processes, shapes_root, output):
    """Losses of three iterations on two images each, through the public command line."""
    folder = ROOT / "projects" / project
    split = Path(shapes_root) / "shapes/train"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={processes}", str(folder / "train_net.py")),
        *("--config-file", str(folder / f"configs/{project.lower()}_tiny.yaml")),
        *("--register", f"few={split / 'annotations.json'},{split / 'images'}"),
        *("OUTPUT_DIR=" + str(output), "SOLVER.MAX_ITER=3", "LOG_PERIOD=1"),
        *("MODEL.DEVICE=cpu", "SOLVER.IMS_PER_BATCH=2", "DATASETS.TRAIN=few", "DATASETS.TEST=()"),
        # Adam would turn rounding errors of vanishing gradients into full steps.
        *("SOLVER.OPTIMIZER=SGD", "SOLVER.BASE_LR=0.002"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{folder}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = (Path(output) / "metrics.json").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "loss" in k} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(("project", "losses"), [("MNC", 11), ("FCIS", 6)])
def test_two_processes_train_like_one(project, losses, shapes_root, tmp_path):
    one, two = (train(project, n, shapes_root, tmp_path / str(n)) for n in (1, 2))
    assert len(one) == len(two) >= 2
    for first, second in zip(one, two):
        assert first.keys() == second.keys() and len(first) == losses
        assert second == pytest.approx(first, rel=1e-4)
