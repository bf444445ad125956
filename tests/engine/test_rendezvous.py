"""Processes of one start find each other, whatever earlier ones have left in torchrun's store."""

import datetime
import threading

import pytest
import torch.distributed as dist

from d2ext.engine import rendezvous

SOON = datetime.timedelta(seconds=20)


@pytest.fixture
def agent():
    """The store that a torchrun keeps while its processes come and go."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=SOON)


def start(agent, monkeypatch, size):
    """Every process of a start in a thread; what each has read that another one has written."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    found = {}

    class Environment(dict):
        def __getitem__(self, key):
            own = {"RANK": threading.current_thread().name, "MASTER_PORT": str(agent.port)}
            return {**own, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}[key]

    environment = Environment(TORCHELASTIC_USE_AGENT_STORE="True")
    monkeypatch.setattr(rendezvous.os, "environ", environment)

    def process():
        rank = int(threading.current_thread().name)
        store = rendezvous.common_store(SOON)
        assert not store.check(["port"]), "of an earlier start"
        store.add("ready", 1)
        while store.add("ready", 0) < size:
            pass
        store.set(f"port{rank}", f"{rank}")
        store.set("port", "")
        found[rank] = [store.get(f"port{other}").decode() for other in range(size)]

    threads = [threading.Thread(target=process, name=str(rank)) for rank in range(size)]
    for thread in reversed(threads):  # the first one comes last
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_processes_of_a_second_start_see_nothing_of_the_first(agent, monkeypatch, size):
    everyone = {rank: [str(other) for other in range(size)] for rank in range(size)}
    assert start(agent, monkeypatch, size) == everyone
    assert start(agent, monkeypatch, size) == everyone


def test_a_process_that_does_not_come_is_named(agent, monkeypatch):
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(agent.port),
        "RANK": "0",
        "WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="no process has started as rank 1"):
        rendezvous.common_store(datetime.timedelta(seconds=0.2))


def test_without_a_store_of_torchrun_there_is_none(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert rendezvous.common_store(SOON) is None
