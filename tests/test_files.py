"""Files that are written: whole or not at all, and nothing else about the place changes."""

import os
import stat
import threading
from pathlib import Path

import pytest

from batchnorm.cli.common import check_outputs
from batchnorm.errors import InputError
from batchnorm.files import check_file, read_json, whole, write

posix = pytest.mark.skipif(os.name != "posix", reason="links, modes and pipes of POSIX")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@posix
class TestPlace:
    """What stands at the path stays what it is."""

    @pytest.mark.parametrize("wanted", [0o600, 0o640, 0o664, 0o755])
    def test_a_file_keeps_its_mode(self, folder, wanted):
        Path("file").write_text("old")
        os.chmod("file", wanted)
        write(Path("file"), "new")
        assert (mode("file"), Path("file").read_text(), names(folder)) == (wanted, "new", ["file"])

    def test_the_content_of_a_private_file_is_private_while_it_is_written(self):
        Path("file").touch(0o600)
        with whole(Path("file")) as temporary:
            assert mode(temporary) == 0o600
        assert mode("file") == 0o600

    def test_a_new_file_has_the_mode_of_any_new_file(self):
        Path("other").touch()
        write(Path("file"), "new")
        assert mode("file") == mode("other")

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root writes other people's files")
    def test_a_file_keeps_its_owner(self):
        Path("file").touch()
        os.chown("file", 12345, 23456)
        write(Path("file"), "new")
        assert (os.stat("file").st_uid, os.stat("file").st_gid) == (12345, 23456)

    def test_links_stay_and_their_target_is_written(self, folder):
        (folder / "sub").mkdir()
        Path("sub/target").write_text("old")
        os.symlink("sub/target", "link")
        os.symlink("link", "linked")
        write(Path("linked"), "new")
        assert Path("linked").is_symlink()
        assert Path("link").is_symlink()
        assert not Path("sub/target").is_symlink()
        assert Path("sub/target").read_text() == "new"
        assert names(folder / "sub") == ["target"]

    def test_hard_links_stay_one_file(self):
        Path("one").write_text("old")
        os.link("one", "other")
        write(Path("one"), "new")
        assert Path("other").read_text() == "new"
        assert Path("one").samefile("other")
        with pytest.raises(FileNotFoundError), whole(Path("one")) as temporary:
            temporary.rename(temporary.with_name("half"))
        assert Path("other").read_text() == "new"

    def test_a_link_to_nothing_yet(self):
        os.symlink("target", "link")
        assert not check_file(Path("link"))
        write(Path("link"), "new")
        assert Path("link").is_symlink()
        assert Path("target").read_text() == "new"

    def test_a_link_in_a_circle(self, folder):
        os.symlink("a", "b")
        os.symlink("b", "a")
        for refuses in (check_file, lambda path: write(path, "new")):
            with pytest.raises(InputError, match="cannot write a"):
                refuses(Path("a"))
        assert names(folder) == ["a", "b"]

    def test_a_pipe_is_written_into(self, folder):
        os.mkfifo("pipe")
        assert not check_file(Path("pipe"))
        read = []
        reader = threading.Thread(target=lambda: read.append(Path("pipe").read_text()), daemon=True)
        reader.start()
        write(Path("pipe"), "new")
        reader.join(timeout=60)
        assert read == ["new"]
        assert stat.S_ISFIFO(os.stat("pipe").st_mode)
        assert names(folder) == ["pipe"]

    def test_a_device_is_written_into(self):
        before = os.stat(os.devnull)
        assert not check_file(Path(os.devnull))
        write(Path(os.devnull), "new")
        after = os.stat(os.devnull)
        assert stat.S_ISCHR(after.st_mode)
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)

    def test_a_failed_write_reaches_no_pipe(self):
        os.mkfifo("pipe")  # which nobody reads: opening it would wait forever
        with pytest.raises(ZeroDivisionError), whole(Path("pipe")):
            raise ZeroDivisionError


class TestCheck:
    """What cannot be written is refused before the work, and checking leaves nothing behind."""

    def test_a_folder(self, folder):
        (folder / "sub").mkdir()
        with pytest.raises(InputError, match="cannot write sub: Is a directory"):
            check_file(Path("sub"))
        with pytest.raises(InputError, match="cannot write sub: Is a directory"):
            write(Path("sub"), "new")
        with pytest.raises(InputError, match="--out must be a file, but sub is a folder"):
            check_outputs({"--out": Path("sub")}, force=True)
        assert names(folder) == ["sub"]

    def test_a_file_in_place_of_the_folder(self):
        Path("file").touch()
        with pytest.raises(InputError, match="cannot write into file"):
            check_outputs({"--out": Path("file/out")}, force=True)
        with pytest.raises(InputError, match="cannot write file/out"):
            write(Path("file/out"), "new")

    def test_a_file_that_exists_needs_force(self, folder):
        Path("file").write_text("precious")
        with pytest.raises(InputError, match=r"--out must not exist yet, but file does; .* --force"):
            check_outputs({"--out": Path("file"), "--csv": None}, force=False)
        check_outputs({"--out": Path("file"), "--csv": None}, force=True)
        check_outputs({"--out": Path("new")}, force=False)
        assert (Path("file").read_text(), names(folder)) == ("precious", ["file"])

    @posix
    def test_a_link_to_a_file_that_exists_needs_force(self):
        Path("file").write_text("precious")
        os.symlink("file", "link")
        with pytest.raises(InputError, match="--force"):
            check_outputs({"--out": Path("link")}, force=False)

    def test_one_file_for_two_options(self):
        with pytest.raises(InputError, match="--json and --csv must be different files, but both are"):
            check_outputs({"--json": Path("new"), "--csv": Path("sub/../new")}, force=True)

    @posix
    def test_one_device_for_two_options(self):
        check_outputs({"--json": Path(os.devnull), "--csv": Path(os.devnull)}, force=False)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "", "{", "9" * 5000, "9" * 400, str(2**63), "\ufeff{}"]
)
def test_json_that_cannot_be_read_is_a_value_error(text):
    Path("file.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"."):
        read_json(Path("file.json"))


def test_integers_of_64_bits():
    Path("file.json").write_text(f"[{-(2**63)}, {2**63 - 1}]")
    assert read_json(Path("file.json")) == [-(2**63), 2**63 - 1]
