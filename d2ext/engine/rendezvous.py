"""A store for the processes of one start of `torchrun`, and of no earlier one.

`init_process_group` by itself tells starts apart by `TORCHELASTIC_RESTART_COUNT`. On several
machines that number differs: where a process has died it is raised, elsewhere the others are
started again without. They would look for each other under different names until no restarts
are left.
"""

import datetime
import os
import socket
import time

import torch.distributed as dist

_PAUSE = 0.05  # seconds between two looks


def common_store(timeout: datetime.timedelta) -> dist.Store | None:
    """A store that is empty and the same one for all processes that are being started now.

    Every process writes a name of its own under its rank, which replaces that of an earlier start.
    The first process answers each name with its own, until all ranks have thanked it; so an
    answer never comes from, or goes to, a process that is gone.

    Returns:
        None if torchrun keeps no store that outlives the processes: there are no restarts then.

    Raises:
        RuntimeError: somebody has not come in time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    if rank == 0:
        _answer(store, name, size, timeout)
    else:
        store.set(f"d2ext/name/{rank}", name)
        store.wait([f"d2ext/first/{name}"], timeout)
        name = store.get(f"d2ext/first/{name}").decode()
        store.set(f"d2ext/thanks/{name}/{rank}", "1")
    return dist.PrefixStore(f"d2ext/{name}", store)


def _answer(store: dist.Store, name: str, size: int, timeout: datetime.timedelta) -> None:
    end = time.monotonic() + timeout.total_seconds()
    missing = set(range(1, size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"d2ext/name/{rank}"]):
                asking = store.get(f"d2ext/name/{rank}").decode()
                store.set(f"d2ext/first/{asking}", name)
            if store.check([f"d2ext/thanks/{name}/{rank}"]):
                missing.discard(rank)
        if missing and time.monotonic() > end:
            raise RuntimeError(f"no process has started as rank {sorted(missing)[0]}")
        time.sleep(_PAUSE)
