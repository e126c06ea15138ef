from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from engine import checkpoint
from engine.checkpoint import CheckpointStore, LocalDisk, StateLockedError
from engine.errors import StorageError

ROOT = Path(__file__).parent.parent.parent

# Stands in for the package, so that a child does not spend seconds on importing torch.
CHILD = """
import sys, types
package = types.ModuleType("engine.checkpoint")
package.__path__ = [sys.argv[1]]
sys.modules["engine.checkpoint"] = package
from pathlib import Path
from engine.checkpoint.errors import StateLockedError
from engine.checkpoint.lock import take_directory
sys.stdin.readline()
try:
    take_directory(Path(sys.argv[2]), allow_network=False)
    sys.stdout.write("held\\n")
except StateLockedError as error:
    sys.stdout.write(f"{error.exit_code} {error}\\n")
sys.stdout.flush()
sys.stdin.readline()
"""


@contextmanager
def locker(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that takes the lock when told to, and ends when told again or left."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(Path(checkpoint.__file__).parent), str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        yield child


def tell(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()


def answer(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_of_twenty_at_once_one_wins_and_its_death_frees_the_directory(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with ExitStack() as stack:
        children = [stack.enter_context(locker(state)) for _ in range(20)]
        for child in children:
            tell(child)
        answers = [answer(child) for child in children]
        assert sorted(answers)[-1] == "held"
        assert [text.startswith("73 ") for text in answers].count(True) == 19

        winner = children[answers.index("held")]
        store = CheckpointStore(state)
        with pytest.raises(StateLockedError, match=f"in use by process {winner.pid}; stop it") as caught:
            store.lock()
        assert (caught.value.exit_code, caught.value.pid) == (73, winner.pid)

        winner.send_signal(signal.SIGKILL)
        winner.wait()
        with store:
            assert (state / "LOCK").read_text() == f"{os.getpid()}\n"


def test_the_lock_is_given_back_and_taken_twice_by_one_store(tmp_path: Path) -> None:
    one, two = CheckpointStore(tmp_path / "state"), CheckpointStore(tmp_path / "state")
    one.lock()
    one.lock()
    with pytest.raises(StateLockedError):
        two.lock()
    one.close()
    one.close()
    with two, pytest.raises(StateLockedError):
        one.lock()


@pytest.mark.parametrize("text", ["", "x", "-1", str(1 << 70), "999999999"])
def test_a_holder_that_left_no_usable_number_is_another_process(tmp_path: Path, text: str) -> None:
    with CheckpointStore(tmp_path / "state"):
        (tmp_path / "state" / "LOCK").write_text(text)
        with pytest.raises(StateLockedError, match="in use by another process"):
            CheckpointStore(tmp_path / "state").lock()


def test_a_holder_of_another_user_is_named_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    with CheckpointStore(tmp_path / "state"):
        monkeypatch.setattr(os, "kill", kill)
        with pytest.raises(StateLockedError, match=f"process {os.getpid()}"):
            CheckpointStore(tmp_path / "state").lock()


def test_the_directory_is_made_with_those_above_it_for_its_owner_alone(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "a" / "b"):
        assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_a_directory_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StorageError, match=r"can be written by everybody; run: chmod o-w") as caught:
        CheckpointStore(tmp_path).lock()
    assert caught.value.exit_code == 74


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat().st_uid
    if owner == 0:
        os.chown(tmp_path, 12345, -1)
        owner = 12345
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(StorageError, match=f"belongs to user {owner}, this process runs as {owner + 1}"):
        CheckpointStore(tmp_path).lock()


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(StorageError, match="cannot be written by user"):
        CheckpointStore(tmp_path).lock()


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(StorageError, match="is not a directory"):
        CheckpointStore(tmp_path / "state").lock()
    with pytest.raises(StorageError, match="cannot be used: Not a directory"):
        CheckpointStore(tmp_path / "state" / "below").lock()


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("keep")
    (tmp_path / "LOCK").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match="cannot be used"):
        CheckpointStore(tmp_path).lock()
    assert (tmp_path / "victim").read_text() == "keep"


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(StorageError, match="cannot be locked: No locks available"):
        CheckpointStore(tmp_path).lock()


def test_a_network_file_system_is_refused_unless_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = f"/dev/a / ext4 rw 0 0\nserver:/b {tmp_path} nfs4 rw 0 0\nserver:/c {tmp_path}x nfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **options: mounts)
    with pytest.raises(StorageError, match=r"on a network file system \(nfs4\)"):
        CheckpointStore(tmp_path / "state").lock()
    with CheckpointStore(tmp_path / "state", disk=LocalDisk(allow_network=True)) as store:
        assert store.load() is None


def test_the_file_system_is_that_of_the_innermost_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = f"server:/b / nfs rw 0 0\n/dev/a {tmp_path} ext4 rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **options: mounts)
    with CheckpointStore(tmp_path / "state") as store:
        assert store.load() is None


def test_a_system_that_does_not_tell_its_mounts_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, **options: object) -> str:
        raise FileNotFoundError(errno.ENOENT, "no such file")

    monkeypatch.setattr(Path, "read_text", refuse)
    with CheckpointStore(tmp_path / "state") as store:
        assert store.load() is None
