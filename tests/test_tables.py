import csv
import io
import json

import pytest

from invdiff.data.tables import read_table
from invdiff.errors import DataError, EvaluationError


def table(folder, content, kind="csv", **options):
    path = folder / f"metadata.{kind}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, **options)


def test_csv_is_read_as_the_csv_module_writes_it(tmp_path):
    rows = [
        {"file_name": "a.png", "text": 'a "dog", sitting', "note": ""},
        {"file_name": "b.png", "text": "two\nlines\r\nand a third", "note": "\u2028 é"},
        {"file_name": "c.png", "text": '""', "note": "x" * 200_000},  # more than a cell of `csv.reader` may hold
    ]
    for ending in ("\n", "\r\n"):
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator=ending)
        writer.writeheader()
        writer.writerows(rows)
        for text in (stream.getvalue(), stream.getvalue().rstrip(), "\ufeff" + stream.getvalue() + ending * 2):
            found = table(tmp_path, text)
            assert (found.rows, found.columns) == (rows, ["file_name", "text", "note"])
            assert found.places == [f"line {line} of {tmp_path / 'metadata.csv'}" for line in (2, 3, 6)]


def test_jsonl_keeps_types_and_rows_may_lack_columns(tmp_path):
    rows = [{"file_name": "a.png", "age": 3, "text": "\u2028 line"}, {"file_name": "b.png", "male": True}]
    found = table(tmp_path, "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "jsonl")
    assert (found.rows, found.columns) == (rows, ["file_name", "age", "text", "male"])
    assert found.places == [f"line {line} of {tmp_path / 'metadata.jsonl'}" for line in (1, 3)]


def test_the_first_rows_can_be_had_alone(tmp_path):
    assert table(tmp_path, 'a\n1\n2\n"open', limit=2).rows == [{"a": "1"}, {"a": "2"}]


def test_faults_are_named_with_file_and_line(tmp_path):
    for kind, content, message in (
        ("csv", 'name,b\n1,2\n3,"two\nlines" x\n', "each quote that opens in the row of line 3 of"),
        ("csv", 'name,b\n"two\nlines","never\nclosed,\n5,6\n', "each quote that opens in the row of line 2 of"),
        ("csv", "name,b\n1,a dog, sitting\n", "Expected 2 cells in line 2 of .*, found 3"),
        ("csv", "name,b\n1,2\n\n3\n", "Expected 2 cells in line 4 of .*, found 1"),
        ("csv", "name,b,name\n1,2,3\n", "each column once in line 1 of .*, found name more than once"),
        ("csv", b"name,b\n1,\xff\xfe\n", "Expected UTF-8 in line 2 of"),
        ("csv", b"name,b\n1,2\n3,\0\0\n", "Expected text in line 3 of .*, found a NUL byte"),
        ("csv", "a,b\n1,2\n", "a column file_name or name in line 1 of .*, found a, b"),
        ("csv", "file_name\n", "found no rows"),
        ("jsonl", '{"name": 1}\n{oops', "Expected JSON in line 2 of .*, found '{oops'"),
        ("jsonl", "[" * 100_000, "Expected JSON in line 1 of"),
        ("jsonl", '{"name": 1}\n\n[1]', r"a JSON object in line 3 of .*, found '\[1\]'"),
        ("jsonl", '{"name": 1, "name": 2}', "each column once in line 1 of .*, found name more than once"),
        ("jsonl", '{"file_name": 1}\n{"text": 2}', "a column file_name or name in line 2 of .*, found text"),
    ):
        for error in (DataError, EvaluationError):
            with pytest.raises(error, match=message) as caught:
                table(tmp_path, content, kind, required=[("file_name", "name")], error=error)
            assert str(tmp_path / f"metadata.{kind}") in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"Could not read .*absent\.csv: No such file"):
        read_table(tmp_path / "absent.csv")
