"""Two real processes measure what one process measures."""

import json
import textwrap

import pytest

# Each process handles every second image; the main one prints the results.
SCRIPT = """
    import argparse, json, sys
    import d2ext
    import torch
    from d2ext.data import register_all, get_dataset_records
    from d2ext.engine import launch
    from d2ext.evaluation import InstanceEvaluator, run_inference
    from detectron2.data import DatasetCatalog
    from detectron2.structures import Boxes, Instances
    from detectron2.utils import comm

    class Guess(torch.nn.Module):
        # The centre of the image is a bottle, an aeroplane or a person, with a score per image.
        def forward(self, batch):
            outputs = []
            for record in batch:
                height, width, number = record["height"], record["width"], record["image_id"] % 9
                found = Instances((height, width))
                box = torch.tensor([width / 4, height / 4, width * 0.75, height * 0.75])
                masks = torch.zeros(3, height, width, dtype=torch.bool)
                masks[:, height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = True
                found.pred_boxes, found.pred_masks = Boxes(box.repeat(3, 1)), masks
                found.scores = torch.tensor([0.1, 0.5, 0.9]) * number / 9
                found.pred_classes = torch.tensor([0, 6, 14])
                outputs.append({"instances": found})
            return outputs

    def measure(args):
        register_all(args.root)
        records = get_dataset_records("voc_sds_train")
        share = records[comm.get_rank() :: comm.get_world_size()]
        evaluator = InstanceEvaluator("voc_sds_train", ("coco", "voc_sds"))
        results = run_inference(Guess(), [[r] for r in share], evaluator)
        assert comm.get_world_size() == args.processes
        if comm.is_main_process():
            print("RESULTS" + json.dumps(results))
        else:
            assert results == {} and evaluator.truth is None

    processes = {"num_gpus": 0, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    asked = {"root": sys.argv[1], "processes": int(sys.argv[2])}
    launch.run(measure, argparse.Namespace(**processes, **asked))
"""


def test_two_processes_measure_what_one_measures(run_python, tmp_path):
    from d2ext.data.voc_sds.example import make_example

    make_example(str(tmp_path), num_images=(7, 1))
    script = tmp_path / "measure.py"
    script.write_text(textwrap.dedent(SCRIPT))
    results = []
    for count in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        launcher = launcher if count > 1 else []
        process = run_python("-W", "ignore", *launcher, script, tmp_path, count)
        assert process.returncode == 0, process.stderr[-3000:]
        (line,) = [x for x in process.stdout.splitlines() if x.startswith("RESULTS")]
        results.append(json.loads(line[len("RESULTS") :]))
    assert set(results[0]) == {"bbox", "segm", "voc_sds"}
    for task in results[0]:
        assert results[1][task] == pytest.approx(results[0][task], nan_ok=True), task
    assert results[0]["voc_sds"]["mAPr@0.5"] > 0
