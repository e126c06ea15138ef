"""Does the suite see? Each of these changes takes one safety out of the code, and a test must fail for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("engine", "streams", "policies", "kernels", "tests")

STATES = "tests/engine/test_checkpoint_crash_states.py"
FIRST_SAVE = f"{STATES}::test_a_crash_during_the_first_save_starts_anew_or_finds_it_whole"
WRITER = "tests/engine/test_writer.py"
OUTBOX = "tests/engine/test_outbox.py"
SINK = "tests/streams/test_files_sink.py"


class Mutant(NamedTuple):
    """One line taken out of a copy of the code, and the tests of which one must fail then."""

    what: str
    file: str
    line: str
    instead: str
    tests: str


MUTANTS = (
    Mutant(
        "a file of a checkpoint is not synced",
        "engine/checkpoint/folder.py",
        "        disk.fsync(raw)",
        "        pass",
        FIRST_SAVE,
    ),
    Mutant(
        "the folder of a checkpoint is not synced",
        "engine/checkpoint/folder.py",
        "    disk.sync_dir(folder)",
        "    pass",
        FIRST_SAVE,
    ),
    Mutant(
        "the name of a checkpoint is not synced",
        "engine/checkpoint/store.py",
        "            self._disk.sync_dir(self.directory)",
        "            pass",
        STATES,
    ),
    Mutant(
        "hashes are not compared",
        "engine/checkpoint/folder.py",
        "    if not entry.matches(found):",
        "    if False:",
        "tests/engine/test_checkpoint_store.py",
    ),
    Mutant(
        "the state directory is not locked",
        "engine/checkpoint/lock.py",
        "        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "        pass",
        "tests/engine/test_checkpoint_lock.py",
    ),
    Mutant(
        "the journal is not synced where a segment begins",
        "streams/journal.py",
        "            os.fdatasync(self._descriptor)",
        "            pass",
        "tests/streams/test_journal.py",
    ),
    Mutant(
        "weights that are not finite are loaded",
        "engine/keeper.py",
        "            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):",
        "            if False:",
        "tests/engine/test_keeper.py::test_weights_that_are_not_finite_are_passed_over",
    ),
    Mutant(
        "a step that is not finite is taken",
        "policies/stepping.py",
        "        if not math.isfinite(peak):",
        "        if False:",
        "tests/policies/test_stepping.py",
    ),
    Mutant(
        "answers that are not finite are not masked",
        "policies/interfaces.py",
        "        if math.isfinite(logits.sum()):",
        "        if True:",
        "tests/policies/test_conformance.py::test_huge_rows_are_survived",
    ),
    Mutant(
        "the sink does not wait for the disk",
        "streams/file_sink.py",
        "            os.fsync(self._fd)",
        "            pass",
        "tests/streams/test_files_sink.py",
    ),
    Mutant(
        "a batch is applied before it is journaled",
        "engine/runner.py",
        "            self._journal(cut)",
        "            self.keeper.sequence += 1",
        "tests/engine/test_keeper.py::test_past_a_damaged_checkpoint_a_longer_journal_leads_to_the_same_state[inline]",
    ),
    Mutant(
        "positions are passed on without a flush",
        "engine/writer.py",
        "            self._retry(sink.name, lambda sink=sink: sink.flush(FLUSH_TIMEOUT_SECONDS))  # type: ignore[misc]",
        "            pass",
        f"{WRITER}::test_positions_are_passed_on_only_after_everything_before_them_is_flushed",
    ),
    Mutant(
        "what was answered before is answered again",
        "engine/writer.py",
        "        if done:",
        "        if False:",
        f"{WRITER}::test_rows_that_were_answered_before_are_not_answered_again",
    ),
    Mutant(
        "what is committed already is sent again",
        "engine/outbox.py",
        "            return end <= covered.get(partition, 0) or self.lost(partition)",
        "            return self.lost(partition)",
        f"{OUTBOX}::test_a_commit_whose_outcome_was_lost_is_not_made_again",
    ),
    Mutant(
        "what is lost is kept and committed",
        "engine/outbox.py",
        "            return end <= covered.get(partition, 0) or self.lost(partition)",
        "            return end <= covered.get(partition, 0)",
        f"{OUTBOX}::test_nothing_of_partitions_that_are_lost_is_committed",
    ),
    Mutant(
        "the offsets of files are not synced",
        "streams/file_state.py",
        "                os.fsync(file.fileno())",
        "                pass",
        "tests/streams/test_file_state.py",
    ),
    Mutant(
        "a file has two writers",
        "streams/file_sink.py",
        "            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "            pass",
        f"{SINK}::test_a_file_has_one_writer",
    ),
    Mutant(
        "the name of a member is not synced",
        "engine/member.py",
        "    disk.sync_dir(file.parent)",
        "    pass",
        "tests/engine/test_member.py::test_a_name_that_was_given_out_survives_every_crash",
    ),
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mutants")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "ops", "docs"):
        (place / name).symlink_to(ROOT / name)
    return place


def run(copy: Path, tests: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.timeout(400)
def test_without_a_mutant_every_test_that_one_names_passes(copy: Path) -> None:
    named = {test for mutant in MUTANTS for test in mutant.tests.split()}
    alone = sorted(test for test in named if "::" not in test or test.partition("::")[0] not in named)
    code, said = run(copy, " ".join(alone))
    assert code == 0, said


@pytest.mark.timeout(400)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_taking_one_safety_out_makes_a_test_fail(mutant: Mutant, copy: Path) -> None:
    path = copy / mutant.file
    lines = (ROOT / mutant.file).read_text().split("\n")
    assert lines.count(mutant.line) == 1, f"{mutant.file} has no such line: {mutant.line}"
    lines[lines.index(mutant.line)] = mutant.instead
    path.write_text("\n".join(lines))
    try:
        code, said = run(copy, mutant.tests)
    finally:
        shutil.copy(ROOT / mutant.file, path)
    assert code == 1, f"no test of {mutant.tests} saw that {mutant.what}: {said}"
