"""Start one or several processes: plainly, by detectron2's `launch`, or under `torchrun`."""

import ctypes
import datetime
import gc
import hashlib
import os
import signal
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from d2ext.engine.rendezvous import common_store
from d2ext.errors import UserError

from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def started_by_torchrun() -> bool:
    """Whether the environment is that of a `torchrun` worker."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def run(function: Callable, args, device: str = "cuda") -> None:
    """Call `function(args)` in as many processes as the command line or `torchrun` asks for.

    Several CPU processes run under `torchrun` (gloo); several GPU processes under either.

    Args:
        function: of `args`.
        args: of the command line: `num_gpus` (`None`: not given), `num_machines`, `machine_rank`
            and `dist_url`.
        device: of the config; with "cpu", processes talk by gloo, also where there are GPUs.

    Raises:
        UserError: more GPUs are asked for than there are, or numbers that make no sense.
    """
    if started_by_torchrun():
        _run_torchrun_worker(function, args, device)
        return
    gpus = 1 if args.num_gpus is None else args.num_gpus
    _check_processes(args, device)
    try:
        detectron2_launch(
            function,
            gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessRaisedException as error:  # with the traceback of one process as its text
        last = str(error).strip().rpartition("\n")[2]
        name, _, text = last.partition(": ")
        if name != f"{UserError.__module__}.{UserError.__qualname__}":
            raise
        raise UserError(text) from error


def _check_processes(args, device: str) -> None:
    gpus, available = args.num_gpus, torch.cuda.device_count()
    if (gpus or 0) < 0:
        raise UserError(f"--num-gpus {gpus}: give their number, or 0 for one process on the CPU")
    if args.num_machines < 1:
        raise UserError(f"--num-machines {args.num_machines}: there is at least one")
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank is {args.machine_rank}; with --num-machines {args.num_machines} it is "
            f"0 to {args.num_machines - 1}"
        )
    several = (
        f"for several CPU processes use torchrun --nproc-per-node={gpus} in front of the script"
        if (gpus or 0) > 1
        else "leave the option out to run on the CPU"
    )
    if gpus and available < gpus:
        raise UserError(f"--num-gpus {gpus}, but this machine has {available} GPUs; {several}")
    if gpus and gpus > 1 and not device.startswith("cuda"):
        raise UserError(f"--num-gpus {gpus}, but the device is '{device}'; {several}")
    if args.num_machines > 1 and not available:
        raise UserError(
            f"--num-machines {args.num_machines}, but this machine has no GPU; for CPU processes "
            "on several machines use torchrun in front of the script"
        )


def end_with_launcher() -> None:
    """Let the system send SIGTERM when `torchrun` is gone, e.g. killed for want of memory.

    Without it the process would wait for the others for half an hour, or go on and keep the
    output folder to itself. Linux only.

    Raises:
        UserError: it has gone before that, which shows by its store.
    """
    set_signal = getattr(ctypes.CDLL(None), "prctl", None)
    if set_signal is not None:
        set_signal(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return  # the store is in the first process
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection(address, timeout=60).close()
    except OSError as error:
        raise UserError(
            f"torchrun cannot be reached at {address[0]}:{address[1]} ({error}); it has ended"
        ) from error


def _run_torchrun_worker(function: Callable, args, device: str) -> None:
    end_with_launcher()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    use_gpu = torch.cuda.is_available() and device.startswith("cuda")
    if use_gpu and torch.cuda.device_count() < local_size:
        raise UserError(
            f"torchrun started {local_size} processes, but this machine has "
            f"{torch.cuda.device_count()} GPUs; start as many, or set MODEL.DEVICE=cpu (yaml) or "
            "train.device=cpu (lazy)"
        )
    if use_gpu:
        torch.cuda.set_device(local_rank)
    store = common_store(DEFAULT_TIMEOUT)  # with None, by the addresses of the environment
    number, count = (-1, -1) if store is None else (rank, size)
    dist.init_process_group(
        "nccl" if use_gpu else "gloo",
        timeout=DEFAULT_TIMEOUT,
        store=store,
        rank=number,
        world_size=count,
    )
    try:
        _create_local_process_group(local_size)
        comm.synchronize()
        function(args)
        comm.synchronize()
    finally:
        _forget_process_groups()
        dist.destroy_process_group()


def is_first_to_say(text: str) -> bool:
    """Whether no other process of a `torchrun` has asked this about the same text.

    What all processes run into at once is then printed once. The answer comes from the store of
    torchrun itself, which outlives a process that fails; without it, everyone is the first.
    """
    if not started_by_torchrun() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"d2ext/said/{restart}/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=5),
        )
        return store.add(key, 1) == 1
    except (RuntimeError, ValueError):  # the store is gone
        return True


def _forget_process_groups() -> None:
    """Drop what detectron2 keeps of the groups.

    A group that something still refers to is torn down only while the interpreter ends; its threads
    may then abort the process ("terminate called without an active exception").
    """
    comm._LOCAL_PROCESS_GROUP = None
    cached = getattr(comm, "_get_global_gloo_group", None)
    if cached is not None and hasattr(cached, "cache_clear"):
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
