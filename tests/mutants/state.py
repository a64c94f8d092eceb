# SPDX-License-Identifier: Apache-2.0
"""Mutants of the devices that survive their server."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["STATE"]

FILE_TESTS: Final = ("tests/nbdtarget/config/test_state_file.py",)
STATE_TESTS: Final = ("tests/nbdtarget/config/test_state.py",)


def _mutant(
    name: str, forgets: str, where: str, old: str, new: str, tests: tuple[str, ...]
) -> Mutant:
    return Mutant(name, forgets, where, ((old, new),), tests)


STATE: Final = (
    _mutant(
        "state-renamed-before-it-is-flushed",
        "After a power cut the file has its name, and bytes that were never written.",
        "nbdtarget.config.state_file:replace_file",
        "        os.fsync(file.fileno())\n",
        "",
        FILE_TESTS,
    ),
    _mutant(
        "state-directory-not-flushed",
        "A device that create has promised to keep is not there after a power cut.",
        "nbdtarget.config.state_file:replace_file",
        "    sync_directory(os.path.dirname(path))\n",
        "",
        FILE_TESTS,
    ),
    _mutant(
        "state-checksum-not-looked-at",
        "A flipped bit makes a device of another size, or on another disk.",
        "nbdtarget.config.state_file:read_state",
        "hashlib.sha256(body.encode()).hexdigest() != digest",
        "not digest",
        FILE_TESTS,
    ),
    _mutant(
        "state-of-a-swap-written-too-late",
        "After a crash an old table is used again, and does not know of writes to the new one.",
        "nbdtarget.config.state:StateDirectory._keep",
        "        device.before_live = self.save\n",
        "",
        STATE_TESTS,
    ),
    _mutant(
        "state-answered-before-it-is-written",
        "A device that create has promised to keep is not there after a crash.",
        "nbdtarget.config.state:StateDirectory.keep",
        "            await self.save()\n",
        "            pass\n",
        STATE_TESTS,
    ),
    _mutant(
        "state-forgets-what-is-not-open-yet",
        "A disk that was away at one start is gone from the state at the next change.",
        "nbdtarget.config.state:_config_of",
        "        return named\n",
        '        return replace(named, table="")\n',
        STATE_TESTS,
    ),
    _mutant(
        "state-forgets-what-is-not-restored-yet",
        "A change while a server starts writes a file without the devices that are still being opened; a crash then loses them.",
        "nbdtarget.config.state:StateDirectory._text",
        "render_state([*self._kept.values(), *self._waiting])",
        "render_state(self._kept.values())",
        STATE_TESTS,
    ),
    _mutant(
        "refused-table-stays-written",
        "A new table refuses and the old one goes on, while the file has the new one: a restart does not find what was written meanwhile.",
        "nbdtarget.dm.mapped_device:MappedDevice._take_back",
        "                await self.before_live()\n            except",
        "                pass\n            except",
        STATE_TESTS,
    ),
    _mutant(
        "unknown-file-counts-as-written",
        "The file has its new text although the directory could not be flushed, and is not written again: an undone create comes back.",
        "nbdtarget.config.state:StateDirectory.save",
        "            self._written = None\n",
        "",
        STATE_TESTS,
    ),
)
