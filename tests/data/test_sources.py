import os
import platform
import sysconfig
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capgap.data import describe, documents, fingerprint
from capgap.errors import DataError
from capgap.recipe import Source

from .conftest import write_jsonl


def _texts(source):
    return [document.text for document in documents(source)]


def test_the_standard_library_is_whole_and_in_a_shuffled_order_that_is_always_the_same():
    first = [document.origin for document in documents(Source(python_stdlib=True))]
    assert first == [document.origin for document in documents(Source(python_stdlib=True))]
    root = Path(sysconfig.get_path("stdlib"))
    names = [Path(origin).relative_to(root).as_posix() for origin in first]
    assert {"json/decoder.py", "os.py", "argparse.py"} <= set(names)
    assert not any("site-packages" in name for name in names)
    assert names != sorted(names)
    # A prefix is a fair sample: the share of the largest folder is about the same in it.
    top = max({name.split("/")[0] for name in names}, key=lambda t: sum(n.startswith(t) for n in names))
    shares = [sum(n.startswith(top) for n in part) / len(part) for part in (names, names[: len(names) // 4])]
    assert abs(shares[0] - shares[1]) < 0.1


def test_files_are_sorted_and_patterns_reach_into_folders(tmp_path):
    for name in ("b.txt", "a.txt", "deep/er/c.txt", "deep/.hidden.txt", "other.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert _texts(Source(text=f"{tmp_path}/**/*.txt")) == ["a.txt", "b.txt", "deep/er/c.txt"]
    assert _texts(Source(text=f"{tmp_path}/*.txt")) == ["a.txt", "b.txt"]
    assert _texts(Source(text=f"{tmp_path}/b.txt")) == ["b.txt"]


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path):
    (tmp_path / "a[1].txt").write_text("found")
    assert _texts(Source(text=f"{tmp_path}/a[1].txt")) == ["found"]


def test_blank_documents_are_left_out(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "", " \n", "two"])
    assert _texts(Source(jsonl=f"{tmp_path}/a.jsonl")) == ["one", "two"]


def test_a_pattern_that_matches_nothing_says_so(tmp_path):
    with pytest.raises(DataError, match=r"recipe: data\.train\.0: jsonl: .*none-\*\.jsonl matches no file"):
        list(documents(Source(jsonl=f"{tmp_path}/none-*.jsonl"), "recipe: data.train.0"))
    with pytest.raises(DataError, match=r"is a folder; to read the files in it write .*/\*\*/\*"):
        list(documents(Source(text=str(tmp_path))))
    with pytest.raises(DataError, match="matches no file"):
        fingerprint(Source(text=f"{tmp_path}/*.txt"))


def test_a_source_without_text_says_so(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"here: text: .*a\.txt: not one document that is not blank"):
        list(documents(Source(text=f"{tmp_path}/a.txt"), "here"))


def test_half_a_surrogate_pair_is_named_by_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "ab\\ud800"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: holds half of a surrogate pair \(\\ud800 at .* 3\)"):
        list(documents(Source(jsonl=f"{tmp_path}/a.jsonl")))


def _parts(**keys):
    return (_texts(Source(**keys, part=part)) for part in ("held-out", "train"))


def test_parts_of_the_standard_library_are_disjoint_and_cover_it():
    parts = [{d.origin for d in documents(Source(python_stdlib=True, part=p))} for p in ("held-out", "train")]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {d.origin for d in documents(Source(python_stdlib=True))}
    assert 0.03 < len(parts[0]) / len(parts[1]) < 0.08


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 60))
def test_several_files_are_parted_by_file_and_no_part_is_empty(tmp_path_factory, count):
    folder = tmp_path_factory.mktemp("files")
    for i in range(count):
        write_jsonl(folder / f"{i}.jsonl", [f"{i} {k}" for k in range(3)])
    held_out, train = _parts(jsonl=f"{folder}/*.jsonl")
    assert held_out
    assert train
    assert sorted(held_out + train) == sorted(_texts(Source(jsonl=f"{folder}/*.jsonl")))
    assert not {text.split()[0] for text in held_out} & {text.split()[0] for text in train}


def test_where_a_file_belongs_does_not_depend_on_where_the_folder_lies(tmp_path):
    for folder in ("one", "two/deeper"):
        for i in range(40):
            write_jsonl(tmp_path / folder / f"{i}.jsonl", [str(i)])
    one, two = (list(_parts(jsonl=f"{tmp_path}/{folder}/*.jsonl")) for folder in ("one", "two/deeper"))
    assert one == two


@settings(max_examples=25, deadline=None)
@given(count=st.integers(40, 200))
def test_one_file_is_parted_by_document(tmp_path_factory, count):
    path = tmp_path_factory.mktemp("file") / "a.jsonl"
    write_jsonl(path, [str(i) for i in range(count)])
    held_out, train = _parts(jsonl=str(path))
    assert not set(held_out) & set(train)
    assert sorted(held_out + train, key=int) == [str(i) for i in range(count)]
    assert count // 20 <= len(held_out) <= count // 20 + 1


def test_a_part_that_cannot_be_taken_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("one document")
    with pytest.raises(DataError, match=r"a\.txt: part: held-out cannot be taken .*documents: blank-line"):
        list(documents(Source(text=f"{tmp_path}/a.txt", part="held-out")))
    with pytest.raises(DataError, match=r"only 1 documents, none of them in this part; the held-out"):
        list(documents(Source(text=f"{tmp_path}/a.txt", part="held-out", documents="blank-line")))


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_of_files_is_read_as_a_dataset(tmp_path, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "set" / "train.jsonl", [f"row {i}" for i in range(60)])
    source = Source(dataset=str(tmp_path / "set"), streaming=streaming)
    assert _texts(source) == [f"row {i}" for i in range(60)]
    held_out, train = _parts(dataset=str(tmp_path / "set"), streaming=streaming)
    assert len(held_out) == 3
    assert sorted(held_out + train) == sorted(_texts(source))


def test_dataset_errors_name_dataset_split_and_row(tmp_path):
    write_jsonl(tmp_path / "set" / "train.jsonl", ["one"])
    where = str(tmp_path / "set")
    with pytest.raises(DataError, match=r"set split train row 1: has no field 'body'; there are text"):
        list(documents(Source(dataset=where, field="body")))
    with pytest.raises(DataError, match=r"set \(config None, split test\): cannot be loaded: .*check the"):
        list(documents(Source(dataset=where, split="test")))
    with pytest.raises(DataError, match=r"gone \(config None, split train\): cannot be loaded"):
        list(documents(Source(dataset=str(tmp_path / "gone"))))
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "one"}\n{"text": bad\n')
    with pytest.raises(DataError, match=r"set .*split train"):
        list(documents(Source(dataset=where)))


def test_a_fingerprint_follows_what_is_read_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo")
    source = Source(text=f"{tmp_path}/*.txt")
    first = fingerprint(source)
    assert first == fingerprint(source) == fingerprint(source.model_copy(update={"weight": 3.0}))
    assert first["files"] == [[str(path.resolve()), 8, path.stat().st_mtime_ns]]
    assert first != fingerprint(source.model_copy(update={"documents": "blank-line"}))
    os.utime(path, ns=(1, 1))
    assert first != fingerprint(source)
    second = fingerprint(source)
    (tmp_path / "b.txt").write_text("three")
    assert second != fingerprint(source)


def test_fingerprints_of_the_standard_library_and_of_datasets(tmp_path):
    library = fingerprint(Source(python_stdlib=True))
    assert library["python"] == platform.python_version()
    assert ["os.py", (Path(sysconfig.get_path("stdlib")) / "os.py").stat().st_size] in library["files"]
    named = {"dataset": "org/set", "config": "c"}
    assert fingerprint(Source(**named)) == {**named, "files": []}  # type: ignore[arg-type]
    write_jsonl(tmp_path / "train.jsonl", ["one"])
    assert fingerprint(Source(dataset=str(tmp_path)))["files"][0][0].endswith("train.jsonl")


def test_a_source_is_described_in_a_few_words():
    assert describe(Source(python_stdlib=True, part="train")) == "python_stdlib (train)"
    assert describe(Source(jsonl="data/*.jsonl")) == "jsonl: data/*.jsonl"


def test_real_text_is_read(test_data):
    books = list(documents(Source(text=f"{test_data}/text/books-en/*.md")))
    assert len(books) == 24
    rows = _texts(Source(jsonl=f"{test_data}/text/wiki-c4-demo/c4_demo.jsonl"))
    assert len(rows) == 300
