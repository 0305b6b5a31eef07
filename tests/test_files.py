"""Files that are replaced as a whole."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hizoo_lite.checkpoints import writer
from hizoo_lite.files import parse_yaml, write_text
from hizoo_lite.train.folder import RunFolder


def test_a_file_is_on_disk_before_it_gets_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def watched_sync(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def watched_replace(old: Path, new: Path) -> None:
        done.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(os, "replace", watched_replace)
    RunFolder(tmp_path).write_summary({"steps": 1})
    writer.write_json(tmp_path / "other.json", {"a": 1})
    assert done == ["file", "rename", "folder"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json", "summary.json"]


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "a: !!bool b",
        "a: !!int ''",
        "a: !!timestamp b",
        "a: !!map b",
        "- a\n- b",
        "3",
        "",
        "a: [",
        "a: !!python/object/apply:os.system ['true']",
        "[" * 100_000,
    ],
)
def test_yaml_that_is_no_mapping_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"wanted are lines|nested too deeply|tag|expected [a-z<]|parsing"):
        parse_yaml(text)


@pytest.mark.parametrize(
    ("text", "told"), [("a: 1\na: 2", "the key 'a' is there twice"), ("a: &x [1]\nb: *x", "aliases")]
)
def test_yaml_says_each_thing_once(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_yaml(text)
