"""Readers of single files: text, JSON lines and Parquet to documents, with errors that say file and line."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from capgap.errors import DataError

_CHUNK = 1 << 20
_ROWS = 1024
_BOM = b"\xef\xbb\xbf"
_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


class Document(NamedTuple):
    """One document: its text, and where it came from (`file:line`, or `file` where it is the whole file)."""

    text: str
    origin: str


class _DamagedError(Exception):
    """The bytes of a compressed file end too early or make no sense."""


def read_text(path: Path, *, blank_line: bool = False) -> Iterator[Document]:
    """A text file (plain, .gz or .zst) as one document, or as one document for each run of non-blank lines.

    Raises: DataError that names the file and the line.
    """
    if not blank_line:
        yield Document(decode(_whole(path), path), str(path))
        return
    block: list[bytes] = []
    first = 1
    for number, line in _lines(path):
        if line.strip():
            if not block:
                first = number
            block.append(line)
        elif block:
            yield Document(decode(b"\n".join(block), path, first), f"{path}:{first}")
            block = []
    if block:
        yield Document(decode(b"\n".join(block), path, first), f"{path}:{first}")


def read_jsonl(path: Path, field: str) -> Iterator[Document]:
    """The text under `field` in each line of a JSON-lines file (plain, .gz or .zst); blank lines are skipped.

    Raises: DataError that names the file, the line, what is there and what would be right.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(decode(line, path, number))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not valid JSON ({error.msg} at column {error.colno}); each line must be one object"
            ) from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or very deep nesting
            raise DataError(f"{where}: this JSON cannot be read ({error}); mend or remove the line") from None
        yield Document(text_of(row, field, where), f"{path}:{number}")


def read_parquet(path: Path, field: str) -> Iterator[Document]:
    """The strings of the column `field` of a Parquet file, one row group in memory at a time.

    Raises: DataError that names the file and, where one row is to blame, the row (from 1).
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(file.schema_arrow, field, path)
            row = 0
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[field]):
                    for value in batch.column(0):
                        row += 1
                        yield Document(_cell(value, f"{path} row {row}", field), f"{path}:{row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: not a whole Parquet file ({_first_line(error)}); write or download it again"
        ) from None


def text_of(row: Any, field: str, where: str) -> str:
    """The string under `field` of a row. Raises DataError that says what the row holds instead."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds {_kind(row)}; it must be an object with the text under {field!r}")
    if field not in row:
        raise DataError(f"{where}: has no field {field!r}; {_there(row)}; set `field` to that with the text")
    if not isinstance(row[field], str):
        raise DataError(f"{where}: field {field!r} holds {_kind(row[field])}; it must be a string")
    return row[field]


def decode(data: bytes, path: Path, first_line: int = 1) -> str:
    """UTF-8 bytes that start at line `first_line` of `path` as text. Raises DataError that names the line."""
    text = data.removeprefix(_BOM) if first_line == 1 else data
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        before = text[: error.start]
        line, column = first_line + before.count(b"\n"), error.start - before.rfind(b"\n")
        raise DataError(
            f"{path} line {line}: not UTF-8 text (byte 0x{text[error.start]:02x} at column {column}: "
            f"{error.reason}); convert the file to UTF-8"
        ) from None


def _whole(path: Path) -> bytes:
    try:
        return b"".join(_chunks(path))
    except _DamagedError as error:
        raise DataError(f"{path}: {error}; compress or download the file again") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes without the newline) of each line."""
    number, begun = 1, []
    try:
        for chunk in _chunks(path):
            head, *rest = chunk.split(b"\n")
            begun.append(head)
            for following in rest:
                yield number, b"".join(begun)
                number, begun = number + 1, [following]
    except _DamagedError as error:
        raise DataError(f"{path} line {number}: {error}; compress or download the file again") from None
    if any(begun):
        yield number, b"".join(begun)


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        if path.suffix == ".gz":
            yield from _gunzip(path)
        elif path.suffix == ".zst":
            yield from _unzstd(path)
        else:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    yield chunk
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _gunzip(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except EOFError:
        raise _DamagedError("the gzip data ends too early") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _DamagedError(f"not valid gzip data ({error})") from None


def _unzstd(path: Path) -> Iterator[bytes]:
    import zstandard

    # Not the library's stream reader: that one takes a cut-off frame for the end of the file.
    with path.open("rb") as file:
        frame, whole = zstandard.ZstdDecompressor().decompressobj(), False
        while data := file.read(_CHUNK):
            while data:
                try:
                    chunk = frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise _DamagedError(f"not valid zstd data ({error})") from None
                if chunk:
                    yield chunk
                whole, data = frame.eof, frame.unused_data if frame.eof else b""
                if whole:
                    frame = zstandard.ZstdDecompressor().decompressobj()
        if not whole:
            raise _DamagedError("the zstd data ends too early")


def _check_column(schema: Any, field: str, path: Path) -> None:
    import pyarrow.types as types

    if field not in schema.names:
        raise DataError(
            f"{path}: has no column {field!r}; {_there(schema.names)}; set `field` to the one with the text"
        )
    kind = schema.field(field).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise DataError(f"{path}: column {field!r} holds {kind}; it must hold strings")


def _cell(value: Any, where: str, field: str) -> str:
    try:
        return text_of({field: value.as_py()}, field, where)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: field {field!r} is not UTF-8 text ({error.reason})") from None


def _there(names: Any) -> str:
    shown = [re.sub(r"\s+", " ", str(name))[:40] for name in names]
    more = f" and {len(shown) - 12} more" if len(shown) > 12 else ""
    return f"there are {', '.join(shown[:12])}{more}" if shown else "there are none"


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
