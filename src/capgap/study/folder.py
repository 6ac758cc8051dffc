"""A study's folder: what it holds is written in `study.json`."""

from pathlib import Path

from capgap.errors import StudyError
from capgap.files import hash_of, read_json, write_json
from capgap.recipe import check
from capgap.study.spec import StudySpec

_FILE = "study.json"
_MAY_GROW = {"students", "seeds", "tokens", "grids", "side_by_side", "retries", "teachers"}


def own(spec: StudySpec, folder: Path) -> None:
    """Marks the folder as this study's. More trials may join it; what its numbers rest on may not change.

    Raises: StudyError if the folder holds another study.
    """
    path = folder / _FILE
    fixed = spec.model_dump(mode="json", exclude=_MAY_GROW)
    if path.is_file():
        there = read_json(path)["fixed"]
        if hash_of(there) != hash_of(fixed):
            differs = ", ".join(key for key in fixed if there.get(key) != fixed[key])
            raise StudyError(
                f"{folder}: holds a study with other settings ({differs}); give another folder, or remove this one"
            )
    write_json(path, {"fixed": fixed, "study": spec.model_dump(mode="json", exclude_defaults=True)})


def read_spec(folder: Path) -> StudySpec:
    """The study of a folder. Raises StudyError if it holds none."""
    path = folder / _FILE
    if not path.is_file():
        raise StudyError(f"{folder}: holds no study (no {_FILE}); capgap study create makes one")
    return check(read_json(path)["study"], StudySpec, str(path))
