import os
import sys
import threading
from pathlib import Path

import pytest

from runtime.errors import OutputError
from runtime.system.files import atomic_write, cache_folder, link_or_copy, output_dir, write_text


@pytest.mark.skipif(sys.platform != "linux", reason="the default location differs between systems")
def test_the_cache_folder_is_the_users_unless_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ADVPROP_CACHE", raising=False)
    assert cache_folder("engines") == tmp_path / "home" / ".cache" / "advprop" / "engines"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("engines") == tmp_path / "xdg" / "advprop" / "engines"
    monkeypatch.setenv("ADVPROP_CACHE", "~/own")
    assert cache_folder("engines") == tmp_path / "home" / "own" / "engines"
    assert not (tmp_path / "home").exists() and not (tmp_path / "xdg").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_written_files_have_the_permissions_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "text")
        assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_files_of_other_threads_are_never_writable_for_everyone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    done = threading.Event()
    modes = set()

    def create_files() -> None:
        while not done.is_set():
            path = tmp_path / "other"
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o666))
            modes.add(path.stat().st_mode & 0o777)
            path.unlink()

    thread = threading.Thread(target=create_files)
    thread.start()
    try:
        for _ in range(100):
            write_text(tmp_path / "a.txt", "text")
    finally:
        done.set()
        thread.join()
        os.umask(before)
    assert modes == {0o644}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write_and_fail() -> None:
        with atomic_write(path) as file:
            file.write(b"new")
            raise LookupError("in the middle")

    with pytest.raises(LookupError):
        write_and_fail()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_an_output_that_cannot_be_written_says_how_to_fix_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file with that name exists: choose another location"):
        output_dir(tmp_path / "file")
    with pytest.raises(OutputError, match="a part of the path is a file, not a folder: choose another location"):
        output_dir(tmp_path / "file" / "below")
    with pytest.raises(OutputError, match=r"cannot write .*; choose another location"):
        write_text(tmp_path / "missing" / "a.txt", "text")


def test_link_or_copy_replaces_the_target(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("new")
    target.write_text("old")
    for _ in range(2):  # the second time the target is the source
        link_or_copy(source, target)
        assert target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    with pytest.raises(FileNotFoundError):
        link_or_copy(tmp_path / "missing", target)
