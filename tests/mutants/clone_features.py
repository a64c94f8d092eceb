# SPDX-License-Identifier: Apache-2.0
"""Mutants of what a clone does beyond the kernel's."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["CLONE_FEATURES"]

CACHE_PY: Final = "nbdtarget/targets/clone/prefetch.py"
HYDRATION_PY: Final = "nbdtarget/targets/clone/hydration.py"
MAPPED_DEVICE_PY: Final = "nbdtarget/dm/mapped_device.py"
RATE_PY: Final = "nbdtarget/targets/rate.py"
TARGET_PY: Final = "nbdtarget/targets/clone/target.py"
CLONE_TESTS: Final = "tests/nbdtarget/targets/clone"
REPLACEMENT: Final = ("tests/nbdtarget/dm/test_replacement.py",)
WALKS: Final = ("tests/crash/test_clone_features.py",)

CLONE_FEATURES: Final = (
    Mutant(
        "cache-does-not-lock",
        "CACHE copies over a client's write of the same moment.",
        CACHE_PY,
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
        (f"{CLONE_TESTS}/test_cache_requests.py", *WALKS),
    ),
    Mutant(
        "cache-copies-what-is-hydrated",
        "CACHE does not look again once it has the lock: what was written meanwhile is lost.",
        CACHE_PY,
        (
            (
                "                at = regions.metadata.maybe_next_unhydrated(at, end)\n"
                "                if at is None:\n"
                "                    break\n"
                "                _, stop, _ = next(regions.metadata.runs(at, end))\n",
                "                stop = end\n",
            ),
        ),
        (f"{CLONE_TESTS}/test_cache_requests.py", *WALKS),
    ),
    Mutant(
        "cache-ends-before-its-regions-are-hydrated",
        "CACHE says that the range is here, and takes its first step only then.",
        CACHE_PY,
        (
            (
                "        elif request.maybe_next() is None:\n",
                "        elif request.errno == 0:\n",
            ),
        ),
        (f"{CLONE_TESTS}/test_cache_requests.py",),
    ),
    Mutant(
        "suspend-waits-for-all-of-a-cache",
        "CACHE of a whole disk holds up a suspend, and the end of the server.",
        CACHE_PY,
        (
            (
                "        elif self._is_resumed:\n            self._queue.append(request)\n",
                "        elif not request.errno:\n            self._queue.append(request)\n",
            ),
        ),
        (f"{CLONE_TESTS}/test_cache_requests.py",),
        hangs=True,
    ),
    Mutant(
        "rate-not-charged",
        "The background copies as fast as it can, whatever rate was set.",
        RATE_PY,
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
        TARGET_PY,
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
        "Whoever has suspended a device finds it running, on another table.",
        MAPPED_DEVICE_PY,
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
        MAPPED_DEVICE_PY,
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
        MAPPED_DEVICE_PY,
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
        "nbdtarget/dm/replacements.py",
        (("                kept=devices,\n", ""),),
        ("tests/nbdtarget/dm/test_renamed.py",),
    ),
    Mutant(
        "then-linear-believes-the-name",
        "A renamed destination is served by a table that names another file.",
        "nbdtarget/dm/open_devices.py",
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
        MAPPED_DEVICE_PY,
        (
            (
                "                self._adopt(table)\n"
                "                await self._resume(table)\n"
                "                raise\n",
                "                raise\n",
            ),
        ),
        REPLACEMENT,
    ),
    Mutant(
        "replaced-target-destroyed-under-a-status",
        "A target is destroyed while a status of it is under way.",
        MAPPED_DEVICE_PY,
        (
            (
                "            await table.unused()\n"
                "            await self._destroy_target(old)\n",
                "            await self._destroy_target(old)\n",
            ),
        ),
        REPLACEMENT,
    ),
)
