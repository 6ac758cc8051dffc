"""A study's folder: what it holds is written in `study.json`."""

import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock

from capgap.errors import StudyError
from capgap.files import hash_of, read_json, write_json
from capgap.recipe import check
from capgap.study.spec import StudySpec

_FILE = "study.json"
_MAY_GROW = {"students", "seeds", "tokens", "grids", "side_by_side", "retries"}


def own(spec: StudySpec, folder: Path, *, shared: bool) -> None:
    """Marks the folder as this study's. More trials may join it; what its numbers rest on may not change.

    Args:
        shared: whether its queue is in a database; that stays as it is too.
    Raises: StudyError if the folder holds another study, or its queue is elsewhere.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # two that start a study at one time must not make two of it
        _own(spec, folder, shared=shared)


def _own(spec: StudySpec, folder: Path, *, shared: bool) -> None:
    path = folder / _FILE
    fixed = spec.model_dump(mode="json", exclude=_MAY_GROW)
    number = uuid.uuid4().hex
    if path.is_file():
        there = _read(path)
        number = there["id"]
        if hash_of(there["fixed"]) != hash_of(fixed):
            differs = ", ".join(key for key in fixed if there["fixed"].get(key) != fixed[key])
            raise StudyError(
                f"{folder}: holds a study with other settings ({differs}); give another folder, or remove this one"
            )
        old = [student.model_dump() for student in read_spec(folder).students]
        if [student.model_dump() for student in spec.students][: len(old)] != old:
            raise StudyError(f"{folder}: students may be added after those it has; these were changed or reordered")
        check_place(folder, shared)
    study = spec.model_dump(mode="json", exclude_defaults=True)
    told = {"id": number, "shared": shared, "fixed": fixed, "study": study}
    if not path.is_file() or read_json(path) != told:
        write_json(path, told)


def disown(folder: Path) -> None:
    """The folder is no study's again, as one whose queue could not be opened when it was made."""
    (folder / _FILE).unlink(missing_ok=True)


def holds_study(folder: Path) -> bool:
    """Whether a study was made in the folder."""
    return (folder / _FILE).is_file()


def identity(folder: Path) -> str:
    """What tells this study from every other, also from one that was in this folder before."""
    return _read(folder / _FILE)["id"]


def check_place(folder: Path, shared: bool) -> None:
    """Raises StudyError if the queue is looked for in a database, `shared`, or in the folder, and is not there."""
    if _read(folder / _FILE)["shared"] and not shared:
        raise StudyError(f"{folder}: its queue is in PostgreSQL; give --storage, or set CAPGAP_STORAGE")
    if shared and not _read(folder / _FILE)["shared"]:
        raise StudyError(f"{folder}: its queue is in the folder itself; leave out --storage, and CAPGAP_STORAGE")


def read_spec(folder: Path) -> StudySpec:
    """The study of a folder. Raises StudyError if it holds none."""
    path = folder / _FILE
    if not path.is_file():
        raise StudyError(f"{folder}: holds no study (no {_FILE}); capgap study create makes one")
    return check(_read(path)["study"], StudySpec, str(path))


def _read(path: Path) -> dict[str, Any]:
    there = read_json(path)
    if not isinstance(there, dict) or not {"id", "shared", "fixed", "study"} <= set(there):
        raise StudyError(f"{path}: of an older version of capgap, or damaged; give another folder")
    return there
