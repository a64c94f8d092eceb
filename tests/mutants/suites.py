# SPDX-License-Identifier: Apache-2.0
"""Mutants of what test suites stand on: scratch copies, and the cuts of torture."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["SUITES"]

SCRATCH_TESTS: Final = ("tests/nbdtarget/targets/scratch/test_target.py",)
TORTURE_TESTS: Final = (
    "tests/nbdtarget/torture/test_trials.py",
    "tests/nbdtarget/torture/test_session.py",
)


def _mutant(
    name: str,
    forgets: str,
    where: str,
    old: str,
    new: str,
    tests: tuple[str, ...],
) -> Mutant:
    return Mutant(name, forgets, where, ((old, new),), tests)


SUITES: Final = (
    _mutant(
        "scratch-reset-does-not-wait",
        "A write of the test before lands after the reset, on top of a write of the test after it.",
        "nbdtarget.targets.scratch.target:ScratchTarget._alone",
        "                if self._nr_at_store:\n",
        "                if False:\n",
        SCRATCH_TESTS,
    ),
    _mutant(
        "scratch-counts-sectors-that-are-not-there",
        "A read during a write sees what the store held before the last reset.",
        "nbdtarget.targets.scratch.target:ScratchTarget._map_write",
        "            bio.on_end(ended)\n",
        "            bio.on_end(ended)\n            self._written.add(first, count)\n",
        SCRATCH_TESTS,
    ),
    _mutant(
        "scratch-takes-any-disk-for-its-store",
        "A mistake in a table line overwrites a disk that holds data.",
        "nbdtarget.targets.scratch.target:_refuse_content",
        "    if OVERWRITE in ctx.permissions:\n",
        "    if True:\n",
        SCRATCH_TESTS,
    ),
    _mutant(
        "scratch-bound-forgets-what-is-under-way",
        "Many writes at once take more space than the bound.",
        "nbdtarget.targets.scratch.target:ScratchTarget._map_write",
        "self._written.nr_sectors + self._nr_reserved\n",
        "self._written.nr_sectors\n",
        SCRATCH_TESTS,
    ),
    _mutant(
        "torture-believes-no-promise",
        "A database that loses what it has acknowledged passes.",
        "nbdtarget.torture.trials:Trials.run",
        "self._recording.lines[:nr_lines]",
        "self._recording.lines[:0]",
        TORTURE_TESTS,
    ),
    _mutant(
        "torture-loses-what-was-flushed",
        "A database that does all right is blamed.",
        "nbdtarget.torture.trials:Trials.make_image",
        "self._follow(cut.flush - 1)",
        "self._follow(max(0, cut.flush - 2))",
        TORTURE_TESTS,
    ),
)
