"""A training and its test in a process of its own, measured by the processor's time."""

import multiprocessing
import time
from collections.abc import Sequence


def measure(config: str, options: Sequence[str], train: str, test: str = "") -> dict:
    """Train a config, then test its last weights.

    Args:
        config: its file or name.
        options: further ones, with an OUTPUT_DIR that may be overwritten.
        train, test: data sets; no test set: no test. The training sees none.

    Returns:
        `seconds` of the processor, of the training alone; `MAX_ITER`, `BASE_LR`, `MIN_SIZE_TEST` as
        they were used; the numbers of mask AP.

    Raises:
        SystemExit: the training failed; it has told why.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(config, list(options), train, test, send))
    process.start()
    send.close()
    try:
        result = receive.recv()
    except EOFError:
        raise SystemExit(f"error: the training of {config} failed") from None
    process.join()
    return result


def _work(config: str, options: list[str], train_set: str, test_set: str, pipe) -> None:
    from d2ext.config import find_config
    from d2ext.engine.loop import evaluate_checkpoint, train
    from d2ext.engine.setup import build_experiment

    config = find_config(config)
    common = [*options, f"DATASETS.TRAIN={train_set}"]
    experiment = build_experiment(config, [*common, "DATASETS.TEST=()"])
    started = time.process_time()
    train(experiment, overwrite=True)
    result = {"seconds": time.process_time() - started}
    for key in ("INPUT.MIN_SIZE_TEST", "SOLVER.BASE_LR", "SOLVER.MAX_ITER"):
        result[key] = experiment.setting(key, None)
    if test_set:
        tested = build_experiment(config, [*common, f"DATASETS.TEST={test_set}"])
        result.update(evaluate_checkpoint(tested, resume=True)["segm"])
    pipe.send(result)
