# SPDX-License-Identifier: Apache-2.0
"""The output of the kernel's dm-cache, step by step, and ours after the same steps.

A script has a step on each line: what dmsetup was told, what dd wrote or read (bytes each, how
many of these to skip, how many); `= …`: the status, but for the numbers of metadata blocks;
`! …`: the step before it fails, with this text. `wait` lets seconds pass.
"""

import pytest

from nbdtarget.common.errors import NbdTargetError, TableError
from tests.support.clock import settle
from tests.support.tables import Disks

# The time that a step took: smq decides by ticks, of which there is one a second, and more when blocks are missed.
STEP_S = 0.4

TABLE = "0 131072 cache /m /c /o 128"


class Replay:
    """Disks of the recordings' sizes, and a device `c` on them."""

    def __init__(self) -> None:
        self.disks = Disks(m=4 << 20, c=16 << 20, o=64 << 20)
        self.failure = ""

    async def run(self, script: str) -> None:
        for line in filter(None, map(str.strip, script.splitlines())):
            await self._step(line)
        assert not self.failure

    async def _step(self, line: str) -> None:
        verb, _, rest = line.partition(" ")
        if verb == "!":
            assert self.failure == rest
            self.failure = ""
            return
        assert not self.failure
        if verb == "=":
            assert await self._status() == rest
            return
        try:
            await self._carry_out(verb, rest)
        except TableError as error:
            self.failure = error.reason
        except NbdTargetError as error:
            self.failure = str(error)
        await settle()
        self.disks.clock.advance(STEP_S)
        await settle()

    async def _carry_out(self, verb: str, rest: str) -> None:
        registry = self.disks.registry
        match verb:
            case "create":
                await registry.create("c", f"{TABLE} {rest}")
            case "load":
                await registry.load("c", f"{TABLE} {rest}")
            case "suspend":
                await registry.suspend("c")
            case "resume":
                await registry.resume("c")
            case "remove":
                await registry.remove("c")
            case "message":
                await registry.get("c").message(0, rest.split())
            case "wait":
                await self._wait(int(rest))
            case _:
                size, skip, count = map(int, rest.split())
                await self._dd(verb, size, range(skip, skip + count))

    async def _wait(self, seconds: int) -> None:
        for _ in range(4 * seconds):
            self.disks.clock.advance(0.25)
            await settle()

    async def _dd(self, verb: str, size: int, at: range) -> None:
        device = self.disks.registry.get("c")
        for nr in at:
            match verb:
                case "read":
                    await device.read(nr * size, size)
                case "write":
                    await device.write(nr * size, bytes(size))
                case "discard":
                    await device.discard(nr * size, size)
                case _:
                    raise AssertionError(verb)

    async def _status(self) -> str:
        ((_, _, kind, words),) = await self.disks.registry.get("c").status()
        fields = words.split(" ")
        assert (kind, fields[0]) == ("cache", "8")
        return " ".join(fields[2:]).rstrip()


# The same steps for every mode and policy; each has its own status lines.
WORKLOAD = """
    create 2 metadata2 {mode} {policy} 0
    = 128 0/256 0 0 0 0 0 0 0 {end}
    write 65536 0 4
    = 128 {written} {end}
    write 4096 64 8
    = 128 {half} {end}
    read 65536 0 4
    read 65536 0 4
    read 65536 0 4
    = 128 {read} {end}
    read 65536 100 8
    = 128 {others} {end}
    wait 3
    = 128 {later} {end}
    suspend
    = 128 {later} {end}
    resume
    = 128 {later} {end}
    remove
    create 2 metadata2 {mode} {policy} 0
    = 128 {again} {end}
    remove
"""
MISSES = {
    "written": "0/256 0 0 0 4 0 0 0",
    "half": "0/256 0 0 0 12 0 0 0",
    "read": "0/256 0 12 0 12 0 0 0",
    "others": "0/256 0 20 0 12 0 0 0",
    "later": "0/256 0 20 0 12 0 0 0",
    "again": "0/256 0 20 0 12 0 0 0",
}


@pytest.mark.parametrize(
    ("mode", "policy", "counts"),
    [
        (
            "writeback",
            "smq",
            {
                "written": "4/256 0 0 0 0 0 4 4",
                "half": "4/256 0 0 0 8 0 4 4",
                "read": "4/256 12 0 0 8 0 4 4",
                "others": "4/256 12 8 0 8 0 4 4",
                "later": "4/256 12 8 0 8 0 4 0",
                "again": "4/256 12 8 0 8 0 0 0",
            },
        ),
        ("writeback", "cleaner", MISSES),
        (
            "writethrough",
            "smq",
            {
                "written": "0/256 0 0 0 4 0 0 0",
                "half": "0/256 0 0 0 12 0 0 0",
                "read": "4/256 4 8 0 12 0 4 0",
                "others": "12/256 4 16 0 12 0 12 0",
                "later": "12/256 4 16 0 12 0 12 0",
                "again": "12/256 4 16 0 12 0 0 0",
            },
        ),
        ("writethrough", "cleaner", MISSES),
        ("passthrough", "smq", MISSES),
        ("passthrough", "cleaner", MISSES),
    ],
)
async def test_workload(mode: str, policy: str, counts: dict[str, str]) -> None:
    end = f"2 metadata2 {mode} 2 migration_threshold 2048 {policy} 0 rw -"
    script = WORKLOAD.format(mode=mode, policy=policy, end=end, **counts)
    await Replay().run(script)


DIRTY = """
    create 2 metadata2 writeback smq 2 migration_threshold 0
    write 65536 0 8
"""
CLEANED = """
    load 2 metadata2 writeback cleaner 0
    suspend
    resume
    wait 1
    = 128 8/256 0 0 {write_hits} 0 0 0 0 2 metadata2 writeback 2 migration_threshold 2048 cleaner 0 rw -
    remove
"""


async def test_dirty_blocks_are_kept_refused_and_written_back() -> None:
    await Replay().run(f"""
    {DIRTY}
    = 128 8/256 0 0 0 0 0 8 8 2 metadata2 writeback 2 migration_threshold 0 smq 0 rw -
    remove
    create 2 metadata2 writeback smq 2 migration_threshold 0
    = 128 8/256 0 0 0 0 0 0 8 2 metadata2 writeback 2 migration_threshold 0 smq 0 rw -
    remove
    create 2 metadata2 passthrough smq 0
    ! cache: cannot enter passthrough mode unless all blocks are clean
    remove
    ! Device does not exist
    create 2 metadata2 writethrough smq 0
    wait 1
    = 128 8/256 0 0 0 0 0 0 0 2 metadata2 writethrough 2 migration_threshold 2048 smq 0 rw -
    remove
    {DIRTY}
    = 128 8/256 0 0 8 0 0 0 8 2 metadata2 writeback 2 migration_threshold 0 smq 0 rw -
    {CLEANED.format(write_hits=8)}
    """)


async def test_passthrough_and_its_messages() -> None:
    end = "2 metadata2 passthrough 2 migration_threshold 2048 smq 0 rw -"
    await Replay().run(f"""
    {DIRTY}
    {CLEANED.format(write_hits=0)}
    create 2 metadata2 passthrough smq 0
    = 128 8/256 0 0 0 0 0 0 0 {end}
    read 65536 0 1
    = 128 8/256 1 0 0 0 0 0 0 {end}
    write 4096 0 1
    = 128 7/256 1 0 1 0 1 0 0 {end}
    write 65536 1 1
    = 128 6/256 1 0 2 0 2 0 0 {end}
    message invalidate_cblocks 5
    = 128 5/256 1 0 2 0 2 0 0 {end}
    message invalidate_cblocks 0-256
    = 128 0/256 1 0 2 0 2 0 0 {end}
    message invalidate_cblocks 0-257
    ! end cblock out of range: 257 > 256
    message invalidate_cblocks 256
    ! begin cblock out of range: 256 >= 256
    message invalidate_cblocks 5-5
    ! invalid cblock range: 5 >= 5
    message invalidate_cblocks 6-5
    ! invalid cblock range: 6 >= 5
    message invalidate_cblocks x
    ! invalid cblock range 'x'
    message invalidate_cblocks 1-x
    ! invalid cblock range '1-x'
    message invalidate_cblocks
    message migration_threshold 64
    message migration_threshold x
    ! bad config value for migration_threshold: x
    message nonsense 1
    ! bad config value for nonsense: 1
    message nonsense
    ! Invalid argument
    = 128 0/256 1 0 2 0 2 0 0 2 metadata2 passthrough 2 migration_threshold 64 smq 0 rw -
    remove
    create 2 metadata2 writeback smq 0
    message invalidate_cblocks 0
    ! cache has to be in passthrough mode for invalidation
    remove
    """)


async def test_discards_leave_blocks_cached() -> None:
    end = "2 metadata2 writeback 2 migration_threshold 0 smq 0 rw -"
    await Replay().run(f"""
    {DIRTY}
    = 128 8/256 0 0 0 0 0 8 8 {end}
    discard 262144 0 1
    = 128 8/256 0 0 0 0 0 8 8 {end}
    write 4096 160 1
    = 128 8/256 0 0 0 1 0 8 8 {end}
    write 4096 0 1
    = 128 8/256 0 0 1 1 0 8 8 {end}
    remove
    """)


@pytest.mark.parametrize("suspend", ["", "suspend"])
async def test_passthrough_is_loaded_early_and_refused_late(suspend: str) -> None:
    # The kernel leaves the device suspended with the table that was refused.
    end = "2 metadata2 writeback 2 migration_threshold 0 smq 0 rw -"
    early, late = (
        ("", suspend) if suspend else ("load 2 metadata2 passthrough smq 0", "")
    )
    await Replay().run(f"""
    create 2 metadata2 writeback smq 2 migration_threshold 0
    {early}
    write 65536 0 1
    {late}
    {"" if early else "load 2 metadata2 passthrough smq 0"}
    resume
    ! cache: cannot enter passthrough mode unless all blocks are clean
    = 128 1/256 0 0 0 0 0 1 1 {end}
    resume
    ! cache: unable to resume cache due to missing proper cache table reload
    = 128 1/256 0 0 0 0 0 1 1 {end}
    load 2 metadata2 writeback cleaner 0
    resume
    wait 1
    = 128 1/256 0 0 0 0 0 0 0 2 metadata2 writeback 2 migration_threshold 2048 cleaner 0 rw -
    remove
    """)


async def test_words_are_shown_as_the_constructor_understood_them() -> None:
    mq = (
        "mq 10 random_threshold 0 sequential_threshold 0 discard_promote_adjustment 0"
        " read_promote_adjustment 0 write_promote_adjustment 0"
    )
    await Replay().run(f"""
    create 0 smq 0
    = 128 0/256 0 0 0 0 0 0 0 1 writeback 2 migration_threshold 2048 smq 0 rw -
    remove
    create 0 mq 4 sequential_threshold 1024 random_threshold 8
    = 128 0/256 0 0 0 0 0 0 0 1 writeback 2 migration_threshold 2048 {mq} rw -
    remove
    create 3 metadata2 writeback no_discard_passdown smq 2 MIGRATION_THRESHOLD 1
    = 128 0/256 0 0 0 0 0 0 0 3 metadata2 writeback no_discard_passdown 2 migration_threshold 1 smq 0 rw -
    remove
    """)
