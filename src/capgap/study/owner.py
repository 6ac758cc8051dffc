"""Who runs a trial, and whether they still live."""

import os
import socket
from pathlib import Path
from typing import Any

import psutil


def me() -> dict[str, Any]:
    """This process, as others can look it up."""
    process = psutil.Process()
    return {"host": host(), "pid": os.getpid(), "started": process.create_time()}


def host() -> str:
    """This machine or, where containers share one, this container: whoever sees the same processes."""
    space = Path("/proc/self/ns/pid")
    return socket.gethostname() + (f" {space.readlink()}" if space.is_symlink() else "")


def known_dead(worker: dict[str, Any] | None) -> bool:
    """Whether a worker is seen to be dead from here; of those elsewhere their heartbeats tell."""
    if worker is None or worker["host"] != host():
        return False
    try:
        process = psutil.Process(worker["pid"])
        # A killed process whose parent is gone may stay a zombie for ever, as in a container without an init.
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - worker["started"]) >= 1.0
    except psutil.NoSuchProcess:
        return True
