"""Files that are empty, cut short, in another encoding or of another structure are refused in one line."""

import pytest
from pydantic import TypeAdapter

from pipeline.documents import ContentError, read_json, read_text, read_toml

NUMBERS = TypeAdapter(dict[str, int])


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", r"is damaged \(it is empty\)"),
        (b" \n", r"it is empty"),
        (b'{"a": 1', "is damaged"),
        (b'{"a": "x"}', r"is damaged \(file.json.a: "),
        (b"[1]", r"is damaged \(file.json: "),
        (b"null", r"is damaged \(file.json: "),
        (b'{"a": NaN}', r"file.json.a: "),
        (b"[" * 100_000, "is damaged"),
        (b'{"a": 1}' + bytes(100), "zero bytes"),
        ('{"a": 1}'.encode("utf-16"), "is in UTF-16, not in UTF-8: convert it"),
        ('{"a": 1}'.encode("utf-16-le"), "zero bytes"),
        ('{"a": 1}'.encode("utf-32"), "UTF-16"),
        (
            '\n{"é": 1}'.encode("latin-1"),
            r"Latin-1 \(byte 0xe9 in line 2\): convert it",
        ),
    ],
)
def test_a_json_file_that_cannot_be_used_is_named_with_the_reason(tmp_path, content, what):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ContentError, match=what) as error:
        read_json(path, NUMBERS)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"a = [1", b"a = 1\na = 2\n", b"a = " + b"[" * 100_000, b"a\r= 1"])
def test_a_file_that_is_not_toml_is_refused(tmp_path, content):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ContentError, match=r"mine.toml is not valid TOML \("):
        read_toml(path)


def test_a_byte_order_mark_and_the_line_ends_of_windows_are_accepted(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\r\nb = 'caf\xc3\xa9'\r\n")
    assert read_toml(path) == {"a": 1, "b": "café"}
    assert not read_text(path).startswith("\ufeff")


def test_a_missing_file_is_not_reported_as_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json", NUMBERS)
