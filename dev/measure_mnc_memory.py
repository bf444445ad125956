#!/usr/bin/env python
"""Peak memory of one prediction of Multi-task Network Cascades on the CPU.

Builds the network of a config with random weights, predicts on a noise image, and prints how much
memory the process had at most: before the prediction, that is with the weights, and after it.
"""

import argparse
import resource
import sys
import time

import torch

from d2ext.data import register_all
from d2ext.engine import build_experiment

DEFAULT_CONFIG = "projects/MNC/configs/mnc_vgg16_voc_sds.yaml"


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default=DEFAULT_CONFIG, help="default: %(default)s")
    parser.add_argument("--height", type=int, default=600, help="of the image; default: 600")
    parser.add_argument("--width", type=int, default=1000, help="default: 1000")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of the config")
    return parser.parse_args(arguments)


def peak_gib():
    """Largest resident size of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30


def measure(config_file, height, width, overrides=()):
    """Predict once.

    Returns:
        "parameters", "weights_gib" (peak before the prediction), "peak_gib", "candidates"
        (boxes that voted), "detections" and "seconds".
    """
    register_all()
    experiment = build_experiment(config_file, list(overrides), with_data=False)
    experiment.set_device("cpu")
    torch.manual_seed(0)
    model = experiment.build_model().eval()
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    counts = []
    model.voting.register_forward_pre_hook(lambda module, inputs: counts.append(len(inputs[0])))
    before, start = peak_gib(), time.perf_counter()
    with torch.no_grad():
        (result,) = model([{"image": image, "height": height, "width": width}])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_gib": round(before, 2),
        "peak_gib": round(peak_gib(), 2),
        "candidates": counts[0],
        "detections": len(result["instances"]),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(arguments=None):
    args = parse_arguments(arguments)
    result = measure(args.config_file, args.height, args.width, args.overrides)
    for name, value in result.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
