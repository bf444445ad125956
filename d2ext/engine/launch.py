"""Start one or several processes: plainly, by detectron2's `launch`, or under `torchrun`."""

import gc
import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from d2ext.errors import UserError

from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm


def started_by_torchrun() -> bool:
    """Whether the environment is that of a `torchrun` worker."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def run(function: Callable, args) -> None:
    """Call `function(args)` in as many processes as the command line or `torchrun` asks for.

    Several CPU processes run under `torchrun` (gloo); several GPU processes under either.

    Raises:
        UserError: more GPUs are asked for than there are.
    """
    if started_by_torchrun():
        _run_torchrun_worker(function, args)
        return
    processes = args.num_gpus * args.num_machines
    available = torch.cuda.device_count()
    if processes > 1 and available < args.num_gpus:
        raise UserError(
            f"--num-gpus {args.num_gpus}, but this machine has {available}; for several CPU "
            f"processes use torchrun --nproc-per-node={args.num_gpus} in front of the script"
        )
    detectron2_launch(
        function,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def _run_torchrun_worker(function: Callable, args) -> None:
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    use_gpu = torch.cuda.is_available()
    if use_gpu and torch.cuda.device_count() < local_size:
        raise UserError(
            f"torchrun started {local_size} processes, but this machine has "
            f"{torch.cuda.device_count()} GPUs"
        )
    if use_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if use_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    try:
        _create_local_process_group(local_size)
        comm.synchronize()
        function(args)
        comm.synchronize()
    finally:
        _forget_process_groups()
        dist.destroy_process_group()


def _forget_process_groups() -> None:
    """Drop what detectron2 keeps of the groups.

    A group that something still refers to is torn down only while the interpreter ends; its threads
    may then abort the process ("terminate called without an active exception").
    """
    comm._LOCAL_PROCESS_GROUP = None
    cached = getattr(comm, "_get_global_gloo_group", None)
    if hasattr(cached, "cache_clear"):
        cached.cache_clear()
    gc.collect()


def _create_local_process_group(local_size: int) -> None:
    """What detectron2's own launcher does for `comm.get_local_rank()` to work."""
    if hasattr(comm, "create_local_process_group"):  # upstream main
        comm.create_local_process_group(local_size)
        return
    for first in range(0, dist.get_world_size(), local_size):
        ranks = list(range(first, first + local_size))
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group
