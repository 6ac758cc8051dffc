"""Text sources: from a recipe's `Source` to a stream of documents."""

import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capgap.data.readers import Document, decode, read_jsonl, read_parquet, read_text, text_of
from capgap.errors import DataError
from capgap.recipe import Source

HELD_OUT_ONE_IN = 20
"""One file in about twenty, or one document in exactly twenty, belongs to the held-out part."""


def documents(source: Source, where: str = "") -> Iterator[Document]:
    """The documents of a source, in an order that is the same each time; blank ones are left out.

    `part` keeps the held-out twentieth of a source, or the rest: whole files where the source has several, by
    a hash of their paths below the pattern's fixed beginning; else documents, by their number.

    Args:
        source: what to read.
        where: what to call the source in errors about it as a whole, such as `recipe.yaml: data.train.0`.
    Raises: DataError that names file and line (or row), what was found and what would be right; also where
        not one document comes out.
    """
    by_document = source.part is not None and _splits_by_document(source, where)
    found, kept = 0, 0
    for document in _all_documents(source, where):
        if not document.text.strip():
            continue
        found += 1
        if by_document and _document_is_held_out(found - 1) != (source.part == "held-out"):
            continue
        _check_characters(document)
        kept += 1
        yield document
    if not kept:
        raise DataError(_nothing_found(source, where, found))


def describe(source: Source) -> str:
    """The source in a few words, such as `jsonl: data/*.jsonl (held-out)`."""
    name = "python_stdlib" if source.python_stdlib else f"{source.kind}: {getattr(source, source.kind)}"
    return f"{name} ({source.part})" if source.part else name


def fingerprint(source: Source, where: str = "") -> dict[str, Any]:
    """What tells this input from another without reading it, as JSON-like values.

    Files count with path, size and time of change; the standard library with Python's version and the sizes;
    a dataset on the hub with its names alone, so that packed data also opens offline. Weights do not count.

    Raises: DataError if a pattern matches no file.
    """
    facts = source.model_dump(mode="json", exclude={"weight", "streaming"}, exclude_defaults=True)
    if source.python_stdlib:
        files = [[name, path.stat().st_size] for name, path in _stdlib_files()]
        return {**facts, "python": platform.python_version(), "files": files}
    if source.dataset:
        root = Path(source.dataset).expanduser()
        paths = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else []
    else:
        paths = [path for _, path in _files(source, where)]
    return {**facts, "files": [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]}


def _all_documents(source: Source, where: str) -> Iterator[Document]:
    if source.dataset:
        yield from _dataset(source, where)
        return
    for _, path in _files(source, where):
        if source.python_stdlib:
            yield from _stdlib_document(path)
        elif source.text:
            yield from read_text(path, blank_line=source.documents == "blank-line")
        elif source.jsonl:
            yield from read_jsonl(path, source.field)
        else:
            yield from read_parquet(path, source.field)


def _files(source: Source, where: str) -> list[tuple[str, Path]]:
    """(path below the pattern's fixed beginning, path) of each file of the source's part."""
    files = _stdlib_files() if source.python_stdlib else _matches(source, where)
    if not files:
        raise DataError(f"{_prefix(where)}python_stdlib: this Python keeps its library in no files; use text")
    if source.part is None or len(files) == 1:
        return files
    held_out = {name for name, _ in files if _hash("part", name) % HELD_OUT_ONE_IN == 0}
    # However few the files are, neither part may come out empty.
    by_hash = sorted((_hash("part", name), name) for name, _ in files)
    held_out = held_out or {by_hash[0][1]}
    if len(held_out) == len(files):
        held_out.discard(by_hash[-1][1])
    return [(name, path) for name, path in files if (name in held_out) == (source.part == "held-out")]


def _stdlib_files() -> list[tuple[str, Path]]:
    """The standard library's files in an order fixed by a hash, so that the first few are a fair sample."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[tuple[str, Path]] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in ("site-packages", "dist-packages")]
        paths = (Path(folder) / name for name in names if name.endswith(".py"))
        files += [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return sorted(files, key=lambda file: (_hash("order", file[0]), file[0]))


def _stdlib_document(path: Path) -> Iterator[Document]:
    try:
        yield Document(decode(path.read_bytes(), path), str(path))
    except DataError:  # the library's tests hold files that are broken on purpose
        return


def _matches(source: Source, where: str) -> list[tuple[str, Path]]:
    pattern = str(Path(getattr(source, source.kind)).expanduser())
    if Path(pattern).is_file():
        return [(Path(pattern).name, Path(pattern))]
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    root = Path(*parts[:fixed])
    # Path.glob would also give hidden files, such as those half written.
    paths = [Path(path) for path in glob.glob(pattern, recursive=True)]  # noqa: PTH207
    files = sorted((path.relative_to(root).as_posix(), path) for path in paths if path.is_file())
    if not files:
        hint = f"matches no file (looked from {Path.cwd()}); give a file, or a pattern with * or **"
        if Path(pattern).is_dir():
            hint = f"is a folder; to read the files in it write {pattern}/**/*"
        raise DataError(f"{_prefix(where)}{source.kind}: {pattern} {hint}")
    return files


def _dataset(source: Source, where: str) -> Iterator[Document]:
    import datasets

    assert source.dataset is not None
    name = f"{_prefix(where)}dataset: {source.dataset}"
    number = 0
    try:
        rows: Any = datasets.load_dataset(source.dataset, source.config, split=source.split, streaming=source.streaming)
        for number, row in enumerate(rows, start=1):
            text = text_of(row, source.field, f"{name} split {source.split} row {number}")
            yield Document(text, f"{source.dataset}:{number}")
    except DataError:
        raise
    except Exception as error:  # the library passes on what its many backends raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        at = f"after row {number}" if number else "cannot be loaded"
        raise DataError(
            f"{name} (config {source.config}, split {source.split}): {at}: {reason}; check the names and the connection"
        ) from None


def _splits_by_document(source: Source, where: str) -> bool:
    if source.python_stdlib:
        return False
    if source.dataset:
        return True
    files = _matches(source, where)
    if len(files) == 1 and source.text and source.documents == "file":
        raise DataError(
            f"{_prefix(where)}{files[0][1]}: part: {source.part} cannot be taken of one file that is one "
            "document; give more files, or documents: blank-line"
        )
    return len(files) == 1


def _document_is_held_out(index: int) -> bool:
    """True for exactly one of each twenty documents, at a place that a hash picks."""
    return index % HELD_OUT_ONE_IN == _hash("document", str(index // HELD_OUT_ONE_IN)) % HELD_OUT_ONE_IN


def _check_characters(document: Document) -> None:
    try:
        document.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{document.origin}: holds half of a surrogate pair (\\u{ord(document.text[error.start]):04x} "
            f"at character {error.start + 1}), which no UTF-8 text can; remove or mend that row"
        ) from None


def _nothing_found(source: Source, where: str, found: int) -> str:
    name = f"{_prefix(where)}{describe(source)}"
    if not found:
        return f"{name}: not one document that is not blank; give a source that holds text"
    return (
        f"{name}: only {found} documents, none of them in this part; the held-out part takes one document in "
        f"{HELD_OUT_ONE_IN}, so give more documents or name a held-out source of its own"
    )


def _prefix(where: str) -> str:
    return f"{where}: " if where else ""


def _hash(purpose: str, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}\n{name}".encode()).digest()[:8], "big")
