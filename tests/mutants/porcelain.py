# SPDX-License-Identifier: Apache-2.0
"""Mutants of the jobs that a stranger trusts with a disk."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["PORCELAIN"]

CACHE_TESTS: Final = ("tests/nbdtarget/porcelain/test_cache.py",)
CLONE_TESTS: Final = ("tests/nbdtarget/porcelain/test_clone.py",)
JOB_TESTS: Final = ("tests/nbdtarget/porcelain/test_job.py",)
CHANGED_TESTS: Final = ("tests/nbdtarget/porcelain/test_changed_by_commands.py",)
UNCACHE_TESTS: Final = ("tests/nbdtarget/control/test_uncache.py",)


def _mutant(
    name: str,
    forgets: str,
    where: str,
    old: str,
    new: str,
    tests: tuple[str, ...],
) -> Mutant:
    return Mutant(name, forgets, where, ((old, new),), tests)


PORCELAIN: Final = (
    _mutant(
        "job-of-a-removed-device-forgets-its-last-commit",
        "The last commit failed when the device was removed, and the exit status is 0.",
        "nbdtarget.porcelain.job:_has_lost_any",
        "return device.has_lost_writes or device.is_uncommitted",
        "return device.has_lost_writes",
        JOB_TESTS,
    ),
    _mutant(
        "job-whose-watching-has-failed-ends-well",
        "The command has not seen whether the clone could record what it copied, and the exit status is 0.",
        "nbdtarget.porcelain.job:Job._watch_to_the_end",
        "            self._has_failed = True\n",
        "",
        JOB_TESTS,
    ),
    _mutant(
        "job-ends-under-other-devices",
        "A command removes the job's device, and clients of other devices of its server lose theirs.",
        "nbdtarget.porcelain.job:Job._watch_to_the_end",
        "if self._daemon.registry.devices():",
        "if False:",
        CHANGED_TESTS,
    ),
    _mutant(
        "job-ends-although-a-removal-may-fail",
        "The last device is being removed, that fails, and its clients lose it all the same.",
        "nbdtarget.dm.registry:Registry.until_empty",
        "(*self.devices(), *self._removing)",
        "self.devices()",
        ("tests/nbdtarget/dm/test_hanging.py",),
    ),
    _mutant(
        "uncache-leaves-its-mappings",
        "A user who gives the old cache line again reads blocks that are out of date.",
        "nbdtarget.control.uncache:UncacheJob._empty",
        "                await self._invalidate()\n",
        "",
        UNCACHE_TESTS,
    ),
    _mutant(
        "uncache-does-not-wait-until-nothing-is-dirty",
        "What only the cache has is to be given up: the target refuses, again and again.",
        "nbdtarget.control.uncache:UncacheJob._drain",
        "if not now.dirty_blocks:",
        "if now.dirty_blocks:",
        UNCACHE_TESTS,
    ),
    _mutant(
        "uncache-stays-in-writeback",
        "Clients dirty blocks as fast as they are cleaned, for ever.",
        "nbdtarget.control.uncache:UncacheJob._drain",
        "line.table_of(WRITETHROUGH, fields)",
        "line.table_of(WRITEBACK, fields)",
        UNCACHE_TESTS,
    ),
    _mutant(
        "uncache-leaves-a-refused-table",
        "A table that was refused stays in the inactive slot, where the next resume takes it.",
        "nbdtarget.control.uncache:UncacheJob._resume",
        '                await self._ask("clear", m.Clear(self._name), m.Done)\n',
        "                await self._table()\n",
        UNCACHE_TESTS,
    ),
    _mutant(
        "uncache-forgets-the-words-of-the-line",
        "A crash meanwhile leaves every block dirty: the dirty log is gone.",
        "nbdtarget.control.uncache:CacheLine.table_of",
        '            ("dirty_log", options.dirty_log),\n',
        "",
        UNCACHE_TESTS,
    ),
    _mutant(
        "uncache-of-a-cache-in-memory-reloads-it",
        "The next table finds an empty cache in memory, and what was dirty is gone.",
        "nbdtarget.control.uncache:CacheLine.is_in_memory",
        "return any(map(is_volatile, (self.metadata, self.cache)))",
        "return False",
        UNCACHE_TESTS,
    ),
    _mutant(
        "cache-porcelain-takes-another-origin",
        "Dirty blocks of one disk are written over another.",
        "nbdtarget.porcelain.cache:_check_shape",
        "if stored != given and not options.resize:",
        "if stored > given and not options.resize:",
        CACHE_TESTS,
    ),
    _mutant(
        "cache-porcelain-makes-a-cache-that-was-lost",
        "An empty file is believed to hold what clients wrote.",
        "nbdtarget.porcelain.cache:plan_cache",
        "            _check_nothing_lost(known, cache, metadata)\n",
        "            pass\n",
        CACHE_TESTS,
    ),
    _mutant(
        "cache-porcelain-writes-back-from-memory",
        "What clients wrote is gone when the server ends in order.",
        "nbdtarget.porcelain.cache:_check_volatile",
        "if options.mode == WRITEBACK and resolve.is_volatile(name):",
        "if not options.mode and resolve.is_volatile(name):",
        CACHE_TESTS,
    ),
    _mutant(
        "cache-porcelain-believes-its-end",
        "A full sync that failed is not told, and the origin is used without its cache.",
        "nbdtarget.porcelain.cache:CacheJob._ended",
        "if known is not None and known.flags & CLEAN_SHUTDOWN:",
        "if known is not None:",
        CACHE_TESTS,
    ),
    _mutant(
        "porcelain-leaves-what-it-made",
        "A start that fails leaves files that the next one refuses.",
        "nbdtarget.porcelain.job:remove_made",
        "            await resolve.remove_created(path)\n",
        "            await asyncio.sleep(0)\n",
        (*CLONE_TESTS, *CACHE_TESTS),
    ),
    _mutant(
        "porcelain-ends-when-nobody-reads",
        "The disk goes away because somebody closed a pipe.",
        "nbdtarget.porcelain.job:Job._report",
        "        except OSError as error:\n"
        '            log.debug("cannot report: %s", error)\n',
        "        except FileNotFoundError as error:\n"
        '            log.debug("cannot report: %s", error)\n',
        (*CLONE_TESTS, *CACHE_TESTS),
    ),
)
