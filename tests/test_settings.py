"""Settings from elsewhere: kinds by hand, and JSON that Python would let pass."""

import os

import pytest

from cfgsafe.errors import CheckpointError
from cfgsafe.settings import (
    FLAG,
    above_zero,
    check_fields,
    either,
    integer,
    list_of,
    number,
    object_of,
    one_of,
    read_settings,
)

KINDS = [
    (integer(1, 3), [1, 3], [0, 4, True, 2.0, "2", [2], {}, 10**400]),
    (number(0, 1), [0, 1, 0.5], [-0.1, 1.1, True, float("nan"), float("inf"), "0.5", 10**400]),
    (above_zero(1), [1e-300, 1], [0, 0.0, -1, 1.5, False]),
    (one_of(True, "gaussian"), [True, "gaussian"], [1, "pissa", [True], False]),
    (list_of(integer(0, 9)), [[], [1, 2]], [1, [1, [2]], [1, None], {}, "12"]),
    (object_of(integer(0, 9)), [{}, {"a": 1}], [{"a": None}, [1], {"a": {"b": 1}}]),
    (either(integer(0, 9), FLAG), [3, True], ["3", None]),
]


@pytest.mark.parametrize(("kind", "good", "bad"), KINDS)
def test_a_kind_takes_what_it_says(kind, good, bad):
    for value in good:
        check_fields({"x": value}, {"x": kind}, "f.json")
    for value in bad:
        with pytest.raises(CheckpointError, match="^f.json: field 'x' is .*; it must be ") as error:
            check_fields({"x": value}, {"x": kind}, "f.json")
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_a_missing_field_is_named_and_null_is_missing(tmp_path):
    path = tmp_path / "f.json"
    path.write_text('{"x": null, "y": 1}')
    assert read_settings(path, {"x": FLAG}) == {"y": 1}
    with pytest.raises(CheckpointError, match="f.json: field 'x' is missing; it must be true or false"):
        read_settings(path, {"x": FLAG}, needed=("x",))


NOT_JSON = [
    ('{"a": NaN}', "NaN is no JSON number"),
    ('{"a": -Infinity}', "-Infinity is no JSON number"),
    ('{"a": 1e999}', "the number 1e999 is too large"),
    ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice"),
    ('{"a": ' + "[" * 100_000, "inside each other"),
    ('{"a": ' + "[" * 60 + "]" * 60 + "}", "more than 50 lists"),
    ("[1]", "a JSON list, not an object"),
    ('{"a": ' + "9" * 5000 + "}", "not JSON"),
]


@pytest.mark.parametrize(("text", "words"), NOT_JSON)
def test_what_is_no_json_is_refused(tmp_path, text, words):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"f.json: .*{words}") as error:
        read_settings(tmp_path / "f.json", {})
    assert len(str(error.value)) < 400


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path):
    (tmp_path / "f.json").write_text('\ufeff{"a": 1}')
    assert read_settings(tmp_path / "f.json", {}) == {"a": 1}


def test_a_pipe_a_folder_and_a_huge_file_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)
    for name, words in (("pipe", "pipe"), ("folder", "folder"), ("huge", "bytes, more than")):
        with pytest.raises(CheckpointError, match=f"{name}: not found or not readable .*{words}"):
            read_settings(tmp_path / name, {})
