"""_files.py: a file is the old one or the new one, whole."""

import json
import os

import pytest

from lora_ref._files import atomic_write, write_json


def content(directory):
    return [(path.name, path.read_bytes()) for path in directory.iterdir()]


def test_a_crash_while_writing_leaves_the_old_file_whole(tmp_path):
    target = tmp_path / "b.json"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"), atomic_write(target) as file:
        file.write(b"new and")
        raise OSError(28, "No space left on device")
    assert content(tmp_path) == [("b.json", b"old")]
    with atomic_write(target) as file:
        file.write(b"new and longer")
        assert target.read_bytes() == b"old"
    assert content(tmp_path) == [("b.json", b"new and longer")]


def test_the_bytes_are_on_the_disk_before_the_file_is_renamed(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_json({"a": 1}, tmp_path / "a.json")
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_json_cannot_hold_are_refused_and_change_nothing(tmp_path, value):
    write_json({"a": "α"}, tmp_path / "a.json")
    with pytest.raises(ValueError, match="JSON"):
        write_json({"a": value}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": "α"}
    assert len(content(tmp_path)) == 1


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_the_target_of_a_link_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "far" / "a.json")
    write_json([1], tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and content(tmp_path / "far") == [("a.json", b"[\n 1\n]\n")]
