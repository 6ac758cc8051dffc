import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from capgap.data.readers import decode, read_jsonl, read_parquet, read_text
from capgap.errors import DataError

ROWS = [{"text": f"row {i}, with\nlines and ünïcode", "id": i} for i in range(5000)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def _compressed(path, data):
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl_is_read_whatever_its_compression(tmp_path, name):
    found = list(read_jsonl(_compressed(tmp_path / name, JSONL), "text"))
    assert [document.text for document in found] == [row["text"] for row in ROWS]
    assert found[41].origin == f"{tmp_path / name}:42"


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_several_compressed_frames_are_one_text(tmp_path, name):
    path = _compressed(tmp_path / name, b"one ")
    path.write_bytes(path.read_bytes() + _compressed(tmp_path / f"b{name}", b"two").read_bytes())
    assert [document.text for document in read_text(path)] == ["one two"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_damaged_compression_names_file_and_line(tmp_path, name, damage):
    path = _compressed(tmp_path / name, JSONL)
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] if damage == "cut" else data[:8] + b"\xff" * 50 + data[58:])
    with pytest.raises(DataError, match=rf"{name} line \d+: .*download the file again"):
        list(read_jsonl(path, "text"))
    with pytest.raises(DataError, match=rf"{name}: .*download the file again"):
        list(read_text(path))


def test_a_zstd_file_cut_at_its_last_byte_is_noticed(tmp_path):
    path = _compressed(tmp_path / "a.txt.zst", JSONL)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="zstd data ends too early"):
        list(read_text(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"a\.jsonl line 3: not valid JSON .* at column \d+.*one object"),
        ('["text"]', r"a\.jsonl line 3: holds a list; it must be an object with the text under 'text'"),
        ('"text"', r"a\.jsonl line 3: holds a string; it must be an object"),
        ('{"body": "x", "id": 1}', r"a\.jsonl line 3: has no field 'text'; there are body, id; set `field`"),
        ('{"text": null}', r"a\.jsonl line 3: field 'text' holds null; it must be a string"),
        ('{"text": 7}', r"a\.jsonl line 3: field 'text' holds a number; it must be a string"),
        ("{}", r"a\.jsonl line 3: has no field 'text'; there are none"),
        ('{"text":' + "[" * 100_000, r"a\.jsonl line 3: this JSON cannot be read \(.*recursion"),
        ('{"id": ' + "1" * 5000 + "}", r"a\.jsonl line 3: this JSON cannot be read \(.*digits.*mend"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        list(read_jsonl(path, "text"))


def test_rows_before_a_bad_one_are_given(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\nbad\n', encoding="utf-8")
    assert next(read_jsonl(path, "text")).text == "good"


@pytest.mark.parametrize("blank_line", [False, True])
def test_bytes_that_are_not_utf8_are_named_by_file_and_line(tmp_path, blank_line):
    path = tmp_path / "a.txt"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "tw\xff"}\n')
    with pytest.raises(DataError, match=r"a\.txt line 3: not UTF-8 text \(byte 0xff at column 13.*convert"):
        list(read_jsonl(path, "text"))
    with pytest.raises(DataError, match=r"a\.txt line 3: not UTF-8 text \(byte 0xff at column 13.*convert"):
        list(read_text(path, blank_line=blank_line))


@given(st.binary(max_size=60))
def test_decoding_agrees_with_python_on_what_is_valid(data):
    try:
        expected = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        with pytest.raises(DataError, match=r"file line \d+: not UTF-8"):
            decode(data, "file")  # type: ignore[arg-type]
    else:
        assert decode(data, "file") == expected  # type: ignore[arg-type]


def test_text_is_kept_as_it_is_but_for_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
    assert [document.text for document in read_text(tmp_path / "a.txt")] == ["one\r\n\r\ntwo\n"]


def test_blank_lines_part_documents(tmp_path):
    (tmp_path / "a.txt").write_text("\n\none\nmore\n \t\n\ntwo\n\nthree", encoding="utf-8")
    found = list(read_text(tmp_path / "a.txt", blank_line=True))
    assert [document.text for document in found] == ["one\nmore", "two", "three"]
    assert [document.origin.rsplit(":", 1)[1] for document in found] == ["3", "7", "9"]


def test_a_file_that_is_a_folder_or_gone_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read \(No such file"):
        list(read_text(tmp_path / "gone.txt"))


def _parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_gives_its_strings_row_group_by_row_group(tmp_path, kind):
    texts = pa.array([row["text"] for row in ROWS]).cast(kind)
    path = _parquet(tmp_path / "a.parquet", {"id": range(len(ROWS)), "text": texts}, row_group_size=700)
    found = list(read_parquet(path, "text"))
    assert [document.text for document in found] == [row["text"] for row in ROWS]
    assert found[1234].origin == f"{path}:1235"


def test_parquet_errors_name_the_file_and_the_row(tmp_path):
    path = _parquet(tmp_path / "a.parquet", {"body": ["x"], "id": [1]})
    with pytest.raises(DataError, match=r"a\.parquet: has no column 'text'; there are body, id; set `field`"):
        list(read_parquet(path, "text"))
    with pytest.raises(DataError, match=r"a\.parquet: column 'id' holds int64; it must hold strings"):
        list(read_parquet(path, "id"))
    path = _parquet(tmp_path / "b.parquet", {"text": ["one", None]})
    with pytest.raises(DataError, match=r"b\.parquet row 2: field 'text' holds null"):
        list(read_parquet(path, "text"))
    invalid = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    path = _parquet(tmp_path / "c.parquet", {"text": invalid})
    with pytest.raises(DataError, match=r"c\.parquet row 1: field 'text' is not UTF-8"):
        list(read_parquet(path, "text"))


@pytest.mark.parametrize("damage", ["cut", "text", "overwritten"])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    path = _parquet(tmp_path / "a.parquet", {"text": [row["text"] for row in ROWS]})
    data = path.read_bytes()
    overwritten = data[:9] + b"\xff" * 400 + data[409:]
    path.write_bytes({"cut": data[: len(data) // 2], "text": b"hello", "overwritten": overwritten}[damage])
    with pytest.raises(DataError, match=r"a\.parquet: not a whole Parquet file .*download it again"):
        list(read_parquet(path, "text"))
