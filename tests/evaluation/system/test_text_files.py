"""Text files that a killed run leaves as they were, or as they are to be."""

from __future__ import annotations

import os
import threading

import pytest

from stride_captum.evaluation.system.text_files import printable, write_text
from stride_captum.system import atomic as whole_files


def test_the_folder_is_made_and_the_path_returned(tmp_path):
    path = tmp_path / "a" / "b.txt"
    assert write_text(str(path), "é\n") == path
    assert path.read_bytes() == "é\n".encode()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fails(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_files.os, step, fails)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_keeps_pointing_to_its_file(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "real" / "a.txt")
    for text in ("first", "second"):
        write_text(link, text)
    assert link.is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "second"


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through")
    reader.join(10)
    assert read == ["through"]
    assert pipe.is_fifo()


def test_names_that_are_not_unicode(tmp_path):
    name = os.fsdecode(b"f\xf6lder")
    assert write_text(tmp_path / "a.txt", name).read_text() == "f?lder"
    assert printable(f"Report: {name}") == "Report: f?lder"
