"""Files that appear whole or not at all, and the hashes that say what a file came from."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capgap.errors import CapgapError, StorageError

LINEAGE = "capgap.json"


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses while writing `path` into a StorageError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageError(f"{path}: the disk is full; free some space and run the same command again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(f"{path}: no permission to write here; choose another folder") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise StorageError(f"{path}: a file is in the way of this folder; remove it or choose another") from error
        raise
    except Exception as error:
        # safetensors and tokenizers wrap the operating system's error in types of their own.
        if "No space left on device" in str(error) and not isinstance(error, CapgapError):
            raise StorageError(f"{path}: the disk is full; free some space and run the same command again") from error
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; it takes the name `path` only if the block succeeds."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            _sync(beside)
            beside.replace(path)
            _sync(path.parent)
        finally:
            beside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a folder beside `path` to fill; it replaces `path` only if the block succeeds."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
    with storage_errors(path):
        beside.mkdir(parents=True)
        try:
            yield beside
            sync_tree(beside)
            if path.exists():
                path.rename(old)
            beside.rename(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process left half written directly in `folder`."""
    for pattern in (".*.tmp", ".*.old"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Has the operating system write a folder, and all that is in it, to the disk."""
    for file in folder.rglob("*"):
        _sync(file)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    with atomic_file(path) as beside:
        beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Reads JSON. Raises CapgapError that names the file and the line where it is broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CapgapError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise CapgapError(f"{path}{where}: not valid JSON ({error})") from None


def hash_of(value: Any) -> str:
    """SHA-256, in hex, of a JSON-like value: equal values have equal hashes, whatever their key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256, in hex, of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """What `capgap.json` in `folder` says, or None where there is none (or none that can be read)."""
    with contextlib.suppress(CapgapError):
        return read_json(Path(folder) / LINEAGE)
    return None
