"""Files that are whole or not there, whatever happens to the process that writes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stride_captum.system import atomic as whole_files
from stride_captum.system.atomic import ABANDONED_SECONDS, atomic_write


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize(
    ("content", "bits"),
    [
        (b"\0\r\n", b"\0\r\n"),
        ("a\nä", "a\nä".encode()),
        (lambda name: Path(name).write_bytes(b"own"), b"own"),
    ],
    ids=["bytes", "text", "function"],
)
def test_every_kind_of_content_replaces_the_old_file(tmp_path, content, bits):
    path = tmp_path / "new" / "folder" / "file"
    for _ in range(2):
        atomic_write(str(path), content)
        assert path.read_bytes() == bits
        assert names(path.parent) == ["file"]


def test_a_function_that_fails_leaves_the_old_file(tmp_path):
    def half(name: str) -> None:
        Path(name).write_text("half")
        raise KeyError("its own error")

    atomic_write(tmp_path / "file", "old")
    with pytest.raises(KeyError, match="its own error"):
        atomic_write(tmp_path / "file", half)
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127])
def test_a_name_may_be_as_long_as_the_system_allows(tmp_path, name):
    atomic_write(tmp_path / name, "long")
    assert names(tmp_path) == [name]


class TestErrorsNameThePath:
    def test_a_folder(self, tmp_path):
        with pytest.raises(IsADirectoryError, match=rf"Is a directory: '{tmp_path}'"):
            atomic_write(tmp_path, "text")
        assert names(tmp_path) == []

    def test_a_parent_that_is_a_file(self, tmp_path):
        atomic_write(tmp_path / "file", "text")
        for path in (tmp_path / "file" / "inside", tmp_path / "file" / "deep" / "inside"):
            with pytest.raises(NotADirectoryError, match=rf"Not a directory: '{path}'"):
                atomic_write(path, "text")

    @pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that even root cannot write")
    def test_a_folder_without_the_right_to_write(self):
        with pytest.raises(OSError, match=r"'/sys/kernel/stride'$") as caught:
            atomic_write("/sys/kernel/stride", "text")
        assert ".part" not in str(caught.value)

    def test_a_full_disk(self, tmp_path):
        def full(name: str) -> None:
            raise OSError(28, "No space left on device", name)

        with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'file'}'"):
            atomic_write(tmp_path / "file", full)

    def test_errors_about_other_files_stay_as_they_are(self, tmp_path):
        def reads(name: str) -> None:
            (tmp_path / "source").read_text()

        with pytest.raises(FileNotFoundError, match="source'"):
            atomic_write(tmp_path / "file", reads)


KILLED = """
import os, signal, sys
from stride_captum.system.atomic import atomic_write

def killed(name):
    open(name, "w").write("half")
    os.kill(os.getpid(), signal.SIGKILL)

atomic_write(sys.argv[1], killed)
"""


class TestKilledWriters:
    @pytest.fixture
    def left(self, tmp_path) -> Path:
        ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "file")])
        assert ended.returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        assert left.name.endswith(".part")
        return left

    @pytest.mark.slow
    def test_what_they_leave_goes_with_a_later_write_to_the_folder(self, left, tmp_path, monkeypatch):
        monkeypatch.setattr(whole_files, "_swept", set())
        old = left.stat().st_mtime - ABANDONED_SECONDS - 60
        os.utime(left, (old, old))
        for name in ("notes.part", "file.0123.part"):  # not ours
            (tmp_path / name).write_text("")
            os.utime(tmp_path / name, (old, old))
        atomic_write(tmp_path / "another", "text")
        assert names(tmp_path) == ["another", "file.0123.part", "notes.part"]

    @pytest.mark.slow
    def test_a_writer_that_may_still_be_at_work_is_left_alone(self, left, tmp_path, monkeypatch):
        monkeypatch.setattr(whole_files, "_swept", set())
        atomic_write(tmp_path / "file", "text")
        assert names(tmp_path) == ["file", left.name]
