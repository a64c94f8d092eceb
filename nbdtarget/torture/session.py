# SPDX-License-Identifier: Apache-2.0
"""A whole run: record, cut, check, shrink; and the replay of one case.

Before any cut the check is run on the disk that has lost nothing. If it fails there, it would fail everywhere, and says nothing about
power cuts.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from nbdtarget.common.clock import monotonic_ns
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.targets.powercut.volatile_cache import BORDERS
from nbdtarget.torture.cuts import Cut, choose_cuts, keep_all
from nbdtarget.torture.mounts import why_no_mounts
from nbdtarget.torture.recorder import record
from nbdtarget.torture.recording import Epoch, Recording, RecordingFiles, read_epochs
from nbdtarget.torture.shrink import lost_writes, shrink
from nbdtarget.torture.trials import Outcome, Trials

__all__ = ["Failure", "Result", "TortureOptions", "replay", "torture"]

MEMORY_DIRECTORY: Final = Path("/dev/shm")
SIZE_MIN: Final = 8 << 20
# A program that runs as another user must come to the mounted file system.
PASSABLE: Final = 0o711


class TortureOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command.

    Args:
        command: the program and its arguments; it runs in the root of the file system.
        check: a shell command that fails if something is wrong; it runs there, too.
        setup: a shell command that runs there before the record begins.
        size: of the disk, in bytes.
        nr_cuts: how many power cuts; see `choose_cuts`, also for `seed`, `every` and `tear_size`.
        output: a directory for the record, which must not exist; None: one for temporary files, removed if all passes.
        command_timeout_s, check_timeout_s: seconds.
    """

    command: tuple[str, ...]
    check: str
    setup: str | None = None
    file_system: str = "ext4"
    size: int = 64 << 20
    nr_cuts: int = 200
    seed: int = 0
    every: int = 0
    tear_size: int = 4096
    output: str | None = None
    command_timeout_s: float = 300.0
    check_timeout_s: float = 60.0


class Failure(NamedTuple):
    """A power cut after which the check fails.

    Attributes:
        cut: shrunk.
        nr_lines: how many lines had been acknowledged.
        nr_at_risk: writes at risk when the power went.
        lost: sectors that were lost, by the number of their write.
        case: the file that replays it.
    """

    cut: Cut
    outcome: Outcome
    nr_lines: int
    nr_at_risk: int
    lost: dict[int, list[int]]
    case: Path


class Result(NamedTuple):
    """The result of a session.

    Attributes:
        nr_tried: power cuts that were tried, the failed one among them.
        record_s, trials_s: seconds.
    """

    nr_writes: int
    nr_flushes: int
    nr_lines: int
    nr_tried: int
    record_s: float
    trials_s: float
    failure: Failure | None


def torture(options: TortureOptions, say: Callable[[str], None]) -> Result:
    """Carry it out; `say` is told how it goes. Raises: NbdTargetError: it cannot be carried out."""
    _check(options)
    files = RecordingFiles(_make_output(options))
    result = None
    try:
        begin_ns = monotonic_ns()
        recording = record(
            files,
            size=options.size,
            file_system=options.file_system,
            setup=options.setup,
            command=options.command,
            check=options.check,
            timeout_s=options.command_timeout_s,
        )
        epochs, nr_epochs = read_epochs(files.log)
        recorded_ns = monotonic_ns()
        nr_writes = sum(len(epoch.writes) for epoch in epochs[:nr_epochs])
        say(
            f"recorded {nr_writes} writes, {nr_epochs} flushes and {len(recording.lines)} lines"
        )
        if not recording.lines:
            say("the command has printed nothing, so it has promised nothing")
        nr_tried, failure = _try_cuts(
            files, recording, (epochs, nr_epochs), options, say
        )
        result = Result(
            nr_writes,
            nr_epochs,
            len(recording.lines),
            nr_tried,
            (recorded_ns - begin_ns) / 1e9,
            (monotonic_ns() - recorded_ns) / 1e9,
            failure,
        )
        return result
    finally:
        if options.output is None and (result is None or result.failure is None):
            shutil.rmtree(files.directory)


def replay(
    case: Path, image: Path | None, check_timeout_s: float
) -> tuple[Recording, Cut, Outcome | None]:
    """Make the disk of a case again, and run the check on it, or keep it as `image`.

    Returns: the outcome; None: the image was made instead. Raises: NbdTargetError.
    """
    files = RecordingFiles(case.parent)
    recording = Recording.load(files)
    try:
        cut = msgspec.json.decode(case.read_bytes(), type=Cut)
    except OSError as error:
        raise NbdTargetError(f"{case}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise NbdTargetError(f"{case}: is not a case: {error}") from None
    epochs, _ = read_epochs(files.log)
    with _work(recording.size) as work:
        trials = Trials(files, recording, epochs, work, check_timeout_s=check_timeout_s)
        try:
            if image is not None:
                if image.exists():
                    raise NbdTargetError(f"{image}: exists already: give another name")
                trials.make_image(cut, image)
                return recording, cut, None
            if reason := why_no_mounts(recording.file_system):
                raise NbdTargetError(reason)
            return recording, cut, trials.run(cut)
        finally:
            trials.close()


def _check(options: TortureOptions) -> None:
    if reason := why_no_mounts(options.file_system):
        raise NbdTargetError(reason)
    if options.size < SIZE_MIN:
        raise NbdTargetError(f"size {options.size}: must be {SIZE_MIN} or more")
    if options.tear_size not in BORDERS:
        raise NbdTargetError(f"tear size {options.tear_size}: must be 512 or 4096")
    if options.every < 0:
        raise NbdTargetError(f"every {options.every} writes: must be 0 or more")
    if options.nr_cuts < 1:
        raise NbdTargetError(f"{options.nr_cuts} cuts: must be 1 or more")


def _make_output(options: TortureOptions) -> Path:
    if options.output is None:
        directory = Path(tempfile.mkdtemp(prefix="nbdtarget-torture-"))
    else:
        directory = Path(options.output).absolute()
        try:
            directory.mkdir()
        except OSError as error:
            raise NbdTargetError(f"{directory}: {error.strerror}") from None
    directory.chmod(PASSABLE)
    return directory


@contextmanager
def _work(size: int) -> Iterator[Path]:
    """A directory for the disks of the trials: in memory if there is room."""
    where = None
    if (
        MEMORY_DIRECTORY.is_dir()
        and shutil.disk_usage(MEMORY_DIRECTORY).free > 4 * size
    ):
        where = MEMORY_DIRECTORY
    with tempfile.TemporaryDirectory(prefix="nbdtarget-torture-", dir=where) as work:
        Path(work).chmod(PASSABLE)
        yield Path(work)


def _try_cuts(
    files: RecordingFiles,
    recording: Recording,
    record: tuple[list[Epoch], int],
    options: TortureOptions,
    say: Callable[[str], None],
) -> tuple[int, Failure | None]:
    """Return how many were tried, and the first that failed."""
    epochs, nr_epochs = record
    with _work(options.size) as work:
        trials = Trials(
            files,
            recording,
            epochs,
            work,
            check_timeout_s=options.check_timeout_s,
        )
        try:
            whole = Cut.of(len(epochs), "nothing is lost", keep_all(epochs[-1]))
            if not (outcome := trials.run(whole)).has_passed:
                said = " ".join(outcome.output.split())
                raise NbdTargetError(
                    f"the check fails although nothing was lost: {outcome.reason}: {said}"
                )
            cuts = choose_cuts(
                epochs[:nr_epochs],
                options.nr_cuts,
                options.seed,
                every=options.every,
                tear_size=options.tear_size,
            )
            for nr, cut in enumerate(cuts, 1):
                if not (outcome := trials.run(cut)).has_passed:
                    say(f"cut {nr} of {len(cuts)} fails; looking for a smaller loss")
                    return nr, _failure(files, trials, epochs, cut, outcome)
            return len(cuts), None
        finally:
            trials.close()


def _failure(
    files: RecordingFiles,
    trials: Trials,
    epochs: list[Epoch],
    cut: Cut,
    outcome: Outcome,
) -> Failure:
    epoch = epochs[cut.flush - 1]
    outcomes = {cut: outcome}

    def fails(smaller: Cut) -> bool:
        outcomes[smaller] = trials.run(smaller)
        return not outcomes[smaller].has_passed

    cut = shrink(cut, epoch, fails)
    case = files.case(1)
    case.write_bytes(msgspec.json.encode(cut))
    return Failure(
        cut,
        outcomes[cut],
        epoch.nr_lines,
        len(epoch.writes),
        lost_writes(cut, epoch),
        case,
    )
