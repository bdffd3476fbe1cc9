"""Run a function in several processes that share the work, as torchrun starts them but without the seconds it takes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

from allot.processes import sharing


def together(count: int, function: Callable[[], Any], seconds: float = 120) -> list[Any]:
    """What `function` gives in each of `count` forked processes; of an exception, itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]

    def work(rank: int) -> None:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        try:
            with sharing():
                found = function()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            traceback.print_exc()
            found = error
        pipes[rank][1].send(found)

    workers = [context.Process(target=work, args=(rank,), daemon=True) for rank in range(count)]
    for worker in workers:
        worker.start()
    try:
        for receiver, _ in pipes:
            assert receiver.poll(seconds), "a process does not answer"
        return [receiver.recv() for receiver, _ in pipes]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
