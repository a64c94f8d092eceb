# SPDX-License-Identifier: Apache-2.0
"""Mutants of the policies: blocks that are lost between queues, pins that do not hold, no progress."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["POLICIES"]

MODEL: Final = "tests/nbdtarget/policies/smq/test_model.py"
PINS: Final = "tests/nbdtarget/policies/smq/test_pins.py"
SMQ_RULES: Final = "tests/nbdtarget/policies/smq/test_policy.py"
SHARE: Final = "tests/nbdtarget/policies/smq/test_lru_shadow.py"
QUEUE_RULES: Final = "tests/nbdtarget/policies/smq/test_multi_level_queue.py"
TRACKER_RULES: Final = "tests/nbdtarget/policies/smq/test_tracker.py"


def _mutant(
    name: str, forgets: str, where: str, old: str, new: str, test: str
) -> Mutant:
    return Mutant(f"policy-{name}", forgets, where, ((old, new),), (test, MODEL))


POLICIES: Final = (
    _mutant(
        "pinned-block-is-demoted",
        "What the user wants cached goes as any other block.",
        "nbdtarget.policies.smq.policy:_IS_QUEUED",
        "and flags & (_DIRTY | _PINNED) != _PINNED",
        "and flags | _PINNED",
        PINS,
    ),
    _mutant(
        "pin-leaves-a-queued-demotion",
        "A block is pinned, and is demoted a moment later.",
        "nbdtarget.policies.smq.tracker:BackgroundTracker.cancel_demotion",
        "work is not None and work.op == DEMOTE and self",
        "work is not None and work.op < DEMOTE and self",
        PINS,
    ),
    _mutant(
        "pin-forgotten-over-a-queued-demotion",
        "A block that was pinned a moment before its demotion is counted, but is in no queue ever.",
        "nbdtarget.policies.smq.policy:Smq.pin",
        "            flags &= ~_PENDING\n        self._set_flags(cblock, flags | _PINNED)",
        "            flags &= ~_PENDING\n            return\n"
        "        self._set_flags(cblock, flags | _PINNED)",
        PINS,
    ),
    _mutant(
        "pin-outlives-its-mapping",
        "Whatever comes into that cache block next is pinned too.",
        "nbdtarget.policies.smq.policy:Smq._free",
        "            self._nr_pinned -= 1\n        self._flags[entry] = 0\n",
        "            self._nr_pinned -= 1\n        self._flags[entry] &= _PINNED\n",
        PINS,
    ),
    _mutant(
        "pin-not-in-the-hint",
        "After a restart nothing is pinned any more.",
        "nbdtarget.policies.smq.policy:Smq.get_hint",
        "return level | PINNED_HINT if flags & _PINNED else level",
        "return level",
        PINS,
    ),
    _mutant(
        "pin-forgotten-with-a-promotion",
        "A block is pinned while it is promoted, and may be demoted as soon as it is there.",
        "nbdtarget.policies.smq.policy:Smq._map",
        "        self._flags[entry] |= _MAPPED",
        "        self._flags[entry] = _MAPPED",
        PINS,
    ),
    _mutant(
        "demotion-reserves-nothing",
        "A block that is being demoted is chosen for a second migration.",
        "nbdtarget.policies.smq.policy:Smq._queue_pending",
        "            self._flags[entry] |= _PENDING\n        else:\n",
        "            self._push_front(entry)\n        else:\n",
        SMQ_RULES,
    ),
    _mutant(
        "failed-promotion-keeps-its-block",
        "Each copy that fails makes the cache one block smaller.",
        "nbdtarget.policies.smq.policy:Smq._unreserve",
        "    def _unreserve(self, work: Work) -> None:\n        self._free(work.cblock)",
        "    def _unreserve(self, work: Work) -> None:\n        self._flags[work.cblock] = 0",
        PINS,
    ),
    _mutant(
        "invalidate-leaves-a-queued-migration",
        "A migration of a block that is gone is handed out, over what is there by then.",
        "nbdtarget.policies.smq.policy:Smq.invalidate",
        "            work = self.tracker.cancel(self._table.blocks[cblock])",
        "            work = self.tracker._pending.get(self._table.blocks[cblock])",
        SMQ_RULES,
    ),
    _mutant(
        "cleaner-promotes-on-demand",
        "A cache that is being ended fills up again.",
        "nbdtarget.policies.smq.policy:Smq.maybe_promote",
        "            not self._may_migrate\n            or oblock in self.tracker",
        "            oblock in self.tracker",
        PINS,
    ),
    _mutant(
        "cached-block-promoted-again",
        "One origin block is in two cache blocks: which of them is read is chance.",
        "nbdtarget.policies.smq.policy:Smq.maybe_promote",
        "            or self._table.find(oblock) >= 0\n",
        "",
        PINS,
    ),
    _mutant(
        "sentinels-not-moved",
        "Nothing that is dirty grows old: a busy cache never writes back.",
        "nbdtarget.policies.smq.multi_level_queue:AgedQueue",
        "            self.links.link_before(self._heads[level], sentinel)\n\n",
        "            self.links.link_before("
        "self.links.next[self._heads[level]], sentinel)\n\n",
        QUEUE_RULES,
    ),
    _mutant(
        "two-migrations-of-one-block",
        "A block is written back and demoted at the same time.",
        "nbdtarget.policies.smq.tracker:BackgroundTracker.start",
        "if work.oblock in self._pending or len",
        "if len",
        TRACKER_RULES,
    ),
    _mutant(
        "migrations-not-bounded",
        "A burst of misses queues migrations until memory is full.",
        "nbdtarget.policies.smq.tracker:BackgroundTracker.start",
        " or len(self._pending) >= self.pending_max",
        "",
        TRACKER_RULES,
    ),
    _mutant(
        "busy-period-never-ends-by-use",
        "A small and busy cache cannot tell its blocks apart, and is worse than LRU.",
        "nbdtarget.policies.smq.policy:Smq.tick",
        "                and nr_misses + self._nr_hit >= nr_events_max\n",
        "                and False\n",
        SHARE,
    ),
    _mutant(
        "full-cache-stays-careful",
        "When other blocks become hot, the cache goes on with those that were.",
        "nbdtarget.policies.smq.policy:Smq.tick",
        "            self._hotspot.promote_level = 0\n",
        "            pass\n",
        SHARE,
    ),
    _mutant(
        "lru-shadow-never-drops",
        "The shadow counts as hits of LRU what LRU would have dropped long ago.",
        "nbdtarget.policies.smq.lru_shadow:LruShadow.note",
        "        elif len(blocks) == self._nr_blocks:\n",
        "        elif False:\n",
        SHARE,
    ),
)
