"""What a run leaves behind, as tests compare it."""

import json
from pathlib import Path


def losses(output_dir):
    """Iteration -> total loss of a run; the last entry of an iteration counts."""
    lines = (Path(output_dir) / "metrics.json").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["iteration"]: r["total_loss"] for r in records if "total_loss" in r}
