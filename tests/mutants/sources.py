# SPDX-License-Identifier: Apache-2.0
"""Mutants of remote images: each lets bytes of another image in, or forgets what was pinned."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["SOURCES"]

HTTP: Final = ("tests/nbdtarget/devices/http/test_store.py",)
CLONE: Final = ("tests/nbdtarget/targets/clone/test_remote_source.py",)
RULES: Final = ("tests/nbdtarget/devices/ranged/test_misbehaving_servers.py",)
PIN: Final = ("tests/nbdtarget/devices/ranged/test_pin.py",)

SOURCES: Final = (
    Mutant(
        "source-answer-not-compared-with-the-pin",
        "The image is replaced while it is copied, and the clone is half of one and half of the other.",
        "nbdtarget.devices.http.answer:check_head",
        (
            (
                '    if pinned is not None:\n        check_pin(pin, pinned, "server")\n',
                "",
            ),
        ),
        RULES,
    ),
    Mutant(
        "source-answer-without-its-etag-believed",
        "A server that does not say which image it sends may send another one.",
        "nbdtarget.devices.ranged.store:check_pin",
        (("if missing := pinned.missing(found):", 'if missing := "":'),),
        RULES,
    ),
    Mutant(
        "object-answer-not-compared-with-the-pin",
        "The same for an object in a bucket whose store knows no If-Match.",
        "nbdtarget.devices.objects.store:_check",
        (('    check_pin(found, pinned, "store")\n', ""),),
        RULES,
    ),
    Mutant(
        "weak-etag-taken-for-the-strong-one",
        "What a proxy calls equal need not have equal bytes.",
        "nbdtarget.devices.ranged.pin:Pin.missing",
        (("if new[key] != value", "if not new[key]"),),
        PIN,
    ),
    Mutant(
        "source-range-not-checked",
        "A server that sends another range than it was asked for puts bytes in the wrong place.",
        "nbdtarget.devices.http.answer:check_head",
        (("if (first, behind) != (begin, min(end, size)):", "if False:"),),
        HTTP,
    ),
    Mutant(
        "source-whole-file-taken-for-a-range",
        "A server without ranges sends the beginning of the file for every range.",
        "nbdtarget.devices.http.answer:_whole_size",
        (("begin or length is None or length > end", "length is None"),),
        ("tests/nbdtarget/devices/http/test_answer.py",),
    ),
    Mutant(
        "source-encoded-answer-taken",
        "Bytes of a compressed body are taken for bytes of the image.",
        "nbdtarget.devices.http.answer:check_head",
        (('if encoding not in ("", "identity"):', "if False:"),),
        HTTP,
    ),
    Mutant(
        "source-broken-answer-begun-again-at-its-beginning",
        "After an answer that broke off, what follows stands in the wrong place.",
        "nbdtarget.devices.ranged.fetcher:Fetcher._ask",
        (
            (
                "attempt.at, end, self.pin, attempt.take",
                "attempt.at // 262144 * 262144, end, self.pin, attempt.take",
            ),
        ),
        HTTP,
    ),
    Mutant(
        "source-change-forgotten-by-the-device",
        "After the image was replaced, reads go on, and may find the old one on another server.",
        "nbdtarget.devices.ranged.fetcher:Fetcher.change",
        (("self.is_over = True\n", "pass\n"),),
        ("tests/nbdtarget/devices/ranged/test_fetcher.py",),
        hangs=True,
    ),
    Mutant(
        "source-recorded-pin-not-compared",
        "Another image of the same template is taken for the recorded one at the next start.",
        "nbdtarget_metadata.disks:_compare_ids",
        (
            (
                "is_other = is_replaced or (is_other and not is_sample_equal)",
                "is_other = is_other and not is_sample_equal",
            ),
        ),
        PIN,
    ),
    Mutant(
        "source-missing-pin-forgiven",
        "A server that tells less than before is believed to have the recorded image.",
        "nbdtarget_metadata.disks:_compare_ids",
        (("    if lost:\n", "    if False:\n"),),
        PIN,
    ),
    Mutant(
        "source-url-swapped-without-a-look",
        "A message puts the URL of another image in the place of the right one.",
        "nbdtarget.devices.ranged.device:RangedDevice.use_name",
        (("if difference := self._pin.difference(found):", 'if difference := "":'),),
        CLONE,
    ),
    Mutant(
        "source-hydration-goes-on-after-a-change",
        "The clone goes on asking a source that has another image now.",
        "nbdtarget.targets.clone.hydration:Hydration._may_run",
        (("and not regions.source.changed", "and True"),),
        CLONE,
    ),
    Mutant(
        "source-secret-sent-to-another-host",
        "A redirect gets the password of the original server.",
        "nbdtarget.devices.http.store:_with_secret",
        ((" or origin_of(url) != origin_of(original.url)", ""),),
        HTTP,
    ),
)
