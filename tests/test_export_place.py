"""Where an export is made: links, files, mounts, and two processes at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hizoo_lite import locks
from hizoo_lite.errors import StorageError, UserError
from hizoo_lite.export.place import check_new, find_place, workplace


def test_links_to_a_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, target in (("link", "empty"), ("dangling", "new")):
        (tmp_path / name).symlink_to(tmp_path / target)
        place = find_place(tmp_path / name)
        check_new(place)
        with workplace(place) as work:
            (work / "export").mkdir()
            (work / "export" / "file").write_text(target)
            (work / "export").replace(place)
        assert (tmp_path / name / "file").read_text() == target
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "empty", "link", "new"]


def test_places_that_no_folder_can_be_renamed_to_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tmp_path / {"a": "b", "b": "a"}[name])
    for out, message in (
        ("file", r"--out: \S*file is a file; allowed: a new or empty folder"),
        ("file/in/it", r"--out: \S*file is a file; no folder can be made in it, and so not \S*file/in/it"),
        ("a", r"--out: \S*a leads nowhere"),
        ("a/in/it", r"--out: \S*a/in/it leads nowhere"),
    ):
        with pytest.raises(UserError, match=message):
            find_place(tmp_path / out)
    with pytest.raises(UserError, match=r"is not empty; allowed: this or that"):
        check_new(find_place(tmp_path), "this or that")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match=r"--out: \S*here is the folder that you are in; allowed: another"):
        check_new(find_place("."))
    monkeypatch.setattr(Path, "is_mount", lambda path: True)
    with pytest.raises(UserError, match="is where a disk is mounted"):
        check_new(tmp_path / "new")


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    place = Path("/proc/self/fdinfo/new")  # also root makes no folder there
    with pytest.raises(UserError, match="/proc/self/fdinfo: cannot be written"), workplace(place):
        pytest.fail("nothing may begin")
    with (
        pytest.raises(StorageError, match=r"weights: cannot be written: No space left on device"),
        workplace(tmp_path / "new"),
    ):
        raise OSError(28, os.strerror(28), "weights")
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time_exports_into_a_folder(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom hizoo_lite.export.place import workplace\n"
        "with workplace(Path(sys.argv[1])) as work:\n"
        "    (work / 'mine').write_text('')\n    print('begun', flush=True)\n    sys.stdin.read()\n"
    )
    place = tmp_path / "new"
    command = [sys.executable, "-c", program, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "begun\n"
        message = r"--out: another export into \S*new is under way"
        with pytest.raises(UserError, match=message), workplace(place):
            pytest.fail("nothing may begin")
        assert (tmp_path / ".new.work" / "mine").exists()
        with workplace(tmp_path / "other"):
            pass
        other.kill()
    assert (tmp_path / ".new.work" / "mine").exists()  # it was killed
    with workplace(place) as work:
        assert [path.name for path in work.iterdir()] == [locks.NAME]
    assert list(tmp_path.iterdir()) == []
