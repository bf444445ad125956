"""Settings of the training loop; a lazy config takes them from here and changes what it needs."""

import torch

train = dict(
    output_dir="./output",
    # Weights to start from: a local file, an http(s) or detectron2:// address; "": random weights.
    init_checkpoint="",
    max_iter=90000,
    # Mixed precision: "float16", on a GPU, or "bfloat16", also on a CPU.
    amp=dict(enabled=False, dtype="float16"),
    # Parts into which the batch of a step is cut, one after the other in memory.
    accumulation_steps=1,
    # Evaluate and keep an exponential moving average of the weights, e.g. 0.999; 0: the weights.
    ema_decay=0.0,
    # Parameters that stay as they are, by patterns of their names: ["backbone.*"].
    freeze=[],
    # Extra arguments of DistributedDataParallel, with several processes.
    ddp=dict(),
    # Iterations between checkpoints, and how many of them to keep (0: all).
    checkpointer=dict(period=5000, max_to_keep=3),
    # Iterations between evaluations; 0: only after training.
    eval_period=0,
    # Result by which to keep model_best.pth, e.g. "segm/AP", or "NAME/segm/AP" with several test
    # sets; "": none. Needs eval_period.
    best_metric="",
    # End the training after so many evaluations in a row without a better value; 0: never.
    early_stopping=0,
    # Leave out and count batches whose loss is NaN or infinite, instead of ending the training.
    skip_nonfinite=False,
    # Test-time augmentation, with --eval-only: short sides of the images, each mirrored as well.
    test_aug=dict(
        enabled=False,
        min_sizes=[400, 500, 600, 700, 800, 900, 1000, 1100, 1200],
        max_size=4000,
        flip=True,
    ),
    # Iterations between two lines on the console, in metrics.json and in TensorBoard.
    log_period=20,
    # Where metrics go as well: "wandb", "mlflow".
    log_writers=[],
    device="cuda" if torch.cuda.is_available() else "cpu",
    # Negative: a different one in each run.
    seed=42,
    cudnn_benchmark=False,
)
