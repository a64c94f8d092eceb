# SPDX-License-Identifier: Apache-2.0
"""Mutants of what a clone does beyond the kernel's."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["CLONE_FEATURES"]

CLONE_TESTS: Final = "tests/nbdtarget/targets/clone"
REPLACEMENT: Final = ("tests/nbdtarget/dm/test_replacement.py",)
WALKS: Final = ("tests/crash/test_clone_features.py",)

CLONE_FEATURES: Final = (
    Mutant(
        "cache-does-not-lock",
        "CACHE copies over a client's write of the same moment.",
        "nbdtarget.targets.clone.prefetch:CacheRequests",
        (
            (
                "        self.regions.prison.lock(begin, end, granted)\n"
                "        return await waiting\n",
                "        cell = Cell(begin, end, granted)\n"
                "        cell.held = True\n"
                "        return cell\n",
            ),
            (
                "            regions.prison.release(cell)\n            regions.wake()",
                "            regions.wake()",
            ),
        ),
        (f"{CLONE_TESTS}/test_prefetch.py", *WALKS),
    ),
    Mutant(
        "cache-copies-what-is-hydrated",
        "CACHE does not look again once it has the lock: what was written meanwhile is lost.",
        "nbdtarget.targets.clone.prefetch:CacheRequests._hydrate_step",
        (
            (
                "                at = regions.metadata.maybe_next_unhydrated(at, end)\n"
                "                if at is None:\n"
                "                    break\n"
                "                _, stop, _ = next(regions.metadata.runs(at, end))\n",
                "                stop = end\n",
            ),
        ),
        (f"{CLONE_TESTS}/test_prefetch.py", *WALKS),
    ),
    Mutant(
        "cache-ends-before-its-regions-are-hydrated",
        "CACHE says that the range is here, and takes its first step only then.",
        "nbdtarget.targets.clone.prefetch:CacheRequests._next",
        (
            (
                "        elif request.maybe_next() is None:\n",
                "        elif request.errno == 0:\n",
            ),
        ),
        (f"{CLONE_TESTS}/test_prefetch.py",),
    ),
    Mutant(
        "suspend-waits-for-all-of-a-cache",
        "CACHE of a whole disk holds up a suspend, and the end of the server.",
        "nbdtarget.targets.clone.prefetch:CacheRequests._next",
        (
            (
                "        elif self._is_resumed:\n            self._queue.append(request)\n",
                "        elif not request.errno:\n            self._queue.append(request)\n",
            ),
        ),
        (f"{CLONE_TESTS}/test_prefetch.py",),
        hangs=True,
    ),
    Mutant(
        "rate-not-charged",
        "The background copies as fast as it can, whatever rate was set.",
        "nbdtarget.targets.rate:Rate.charge",
        (
            (
                "            self._paid_ns = begun_ns + length * _NS // self._bytes_per_s\n",
                "            self._paid_ns = begun_ns\n",
            ),
        ),
        ("tests/nbdtarget/targets/test_rate.py",),
    ),
    Mutant(
        "linear-before-the-bits-are-durable",
        "The clone is swapped away with its last bits uncommitted: never recorded.",
        "nbdtarget.targets.clone.target:CloneTarget",
        (
            (
                "is_sound = self._is_hydrated and not",
                "bits = self._metadata\n"
                "        is_full = bits.nr_hydrated == bits.nr_regions\n"
                "        is_sound = is_full and not",
            ),
            (
                "        if not self._is_hydrated and self._metadata.hydration_done:\n",
                "        self._maybe_become_linear()\n"
                "        if not self._is_hydrated and self._metadata.hydration_done:\n",
            ),
        ),
        (f"{CLONE_TESTS}/test_then_linear.py",),
    ),
    Mutant(
        "replacement-wakes-a-suspended-device",
        "A user who has suspended a device finds it running, on another table.",
        "nbdtarget.dm.mapped_device:MappedDevice._check_replaceable",
        (
            (
                "        if self.state is not State.ACTIVE:\n"
                '            raise TableError("the device is suspended", errnos.EBUSY)\n',
                "",
            ),
        ),
        REPLACEMENT,
    ),
    Mutant(
        "replacement-beside-an-inactive-table",
        "A table that somebody has loaded meets one that it was not meant for.",
        "nbdtarget.dm.mapped_device:MappedDevice._check_replaceable",
        (
            (
                "        if self.inactive is not None:\n"
                '            raise TableError("there is an inactive table", errnos.EBUSY)\n',
                "",
            ),
        ),
        REPLACEMENT,
    ),
    Mutant(
        "replaced-although-writes-were-lost",
        "A target that lost writes is swapped away, and flushes succeed again.",
        "nbdtarget.dm.mapped_device:MappedDevice.replace_target",
        (
            (
                "                if table.failed or old.has_lost_writes():\n",
                "                if table.failed:\n",
            ),
        ),
        REPLACEMENT,
    ),
    Mutant(
        "then-linear-opens-by-name",
        "The disk under a hydrated clone is opened again by name: another file, or an empty one in memory.",
        "nbdtarget.dm.replacements:Replacements._replace",
        (("                kept=devices,\n", ""),),
        ("tests/nbdtarget/dm/test_renamed.py",),
    ),
    Mutant(
        "then-linear-believes-the-name",
        "A renamed destination is served by a table that names another file.",
        "nbdtarget.dm.open_devices:OpenDevices.keep_open",
        (
            (
                "        if means != opened.identity and not is_always_another:\n",
                "        if False and is_always_another:\n",
            ),
        ),
        ("tests/nbdtarget/dm/test_renamed.py",),
    ),
    Mutant(
        "refused-replacement-stays",
        "A new target that refuses to resume leaves the device suspended on it.",
        "nbdtarget.dm.mapped_device:MappedDevice.replace_target",
        (
            (
                "                self._adopt(table)\n"
                "                await to_the_end(self._resume(table))\n"
                "                raise\n",
                "                raise\n",
            ),
        ),
        REPLACEMENT,
    ),
    Mutant(
        "replaced-target-destroyed-under-a-status",
        "A target is destroyed while a status of it is under way.",
        "nbdtarget.dm.mapped_device:MappedDevice._destroy_replaced",
        (
            (
                "        await table.unused()\n"
                "        await self._destroy_target(old)\n",
                "        await self._destroy_target(old)\n",
            ),
        ),
        REPLACEMENT,
    ),
)
