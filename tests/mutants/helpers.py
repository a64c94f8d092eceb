# SPDX-License-Identifier: Apache-2.0
"""Mutants of captive helpers: each lets a helper do more than read one disk, live longer than we, or read another image than it was started for."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["HELPERS"]

HERE: Final = "tests/nbdtarget/devices/helper/"
WORDS: Final = (f"{HERE}test_words.py",)
INFO: Final = (f"{HERE}test_image_info.py",)
LOOK: Final = (f"{HERE}test_look.py",)
LAUNCH: Final = (f"{HERE}test_launch.py",)
PROCESS: Final = (f"{HERE}test_process.py",)
DEVICE: Final = (f"{HERE}test_device.py",)
CONTAINER: Final = (f"{HERE}test_container.py",)
STATE: Final = (f"{HERE}test_state.py",)
RBD: Final = (f"{HERE}test_rbd_info.py", f"{HERE}test_rbd_name.py")

HELPERS: Final = (
    Mutant(
        "qemu-nbd-may-write",
        "qemu-nbd opens the image for writing, and a fault of ours or of a client could change it.",
        "nbdtarget.devices.helper.words:QemuName.argv",
        (('"--read-only", ', ""),),
        WORDS,
    ),
    Mutant(
        "nbdkit-may-write",
        "The same for nbdkit.",
        "nbdtarget.devices.helper.words:NbdkitName.argv",
        (('            "--readonly",\n', ""),),
        WORDS,
    ),
    Mutant(
        "helper-started-by-a-shell",
        "What stands in a name is given to a shell: who may load a table may run commands.",
        "nbdtarget.devices.helper.process:launch",
        (("        *argv,\n", '        "sh", "-c", " ".join(argv),\n'),),
        LOOK,
    ),
    Mutant(
        "plugins-that-run-programs-taken",
        "nbdkit's plugins sh and eval run commands of the one who loads the table.",
        "nbdtarget.devices.helper.words:parse_nbdkit",
        (("if plugin not in PLUGINS:", "if False:"),),
        WORDS,
    ),
    Mutant(
        "protocols-of-qemu-not-bounded",
        "json: names any block driver, with any option.",
        "nbdtarget.devices.helper.words:parse_qemu",
        (("protocol is not None and protocol not in PROTOCOLS", "False"),),
        WORDS,
    ),
    Mutant(
        "options-of-ceph-not-bounded",
        "Ceph's options name files that it writes to.",
        "nbdtarget.devices.helper.rbd_name:parse_rbd_of_qemu",
        (("set(told) - {*_OPTIONS}", "False"),),
        (*WORDS, *RBD),
    ),
    Mutant(
        "password-taken-in-a-name",
        "A password stands in the arguments of a process, where every user can read it.",
        "nbdtarget.devices.helper.words:_check_url",
        (("if match and", "if False and match and"),),
        WORDS,
    ),
    Mutant(
        "backing-files-allowed-unasked",
        "The maker of an image names a file of this machine, and its bytes are in the disk.",
        "nbdtarget.devices.helper.image_info:refuse_references",
        (("    if not found:\n", "    if True:\n"),),
        INFO,
    ),
    Mutant(
        "data-file-of-a-qcow2-not-looked-for",
        "The same by the data file.",
        "nbdtarget.devices.helper.image_info:references",
        (('data_file := data.get("data-file")', 'data_file := ""'),),
        INFO,
    ),
    Mutant(
        "extents-of-a-vmdk-not-looked-for",
        "The same by the extents.",
        "nbdtarget.devices.helper.image_info:references",
        (("if filename != what:", "if False:"),),
        INFO,
    ),
    Mutant(
        "look-without-bounds-of-time-and-memory",
        "An image that was made to cost much takes the whole machine.",
        "nbdtarget.devices.helper.launch:main",
        (
            ("    if memory:\n", "    if False:\n"),
            ("    if cpu_s:\n", "    if False:\n"),
        ),
        LAUNCH,
    ),
    Mutant(
        "look-does-not-hand-its-bounds-on",
        "The same, one floor higher.",
        "nbdtarget.devices.helper.look:look",
        (("cpu_s=CPU_S, memory=memory, ", ""),),
        LOOK,
    ),
    Mutant(
        "output-of-a-look-not-bounded",
        "A look that prints without end fills the memory of the server.",
        "nbdtarget.devices.helper.look:_bounded",
        (("kept += data[: OUTPUT_MAX - len(kept)]", "kept += data"),),
        LOOK,
    ),
    Mutant(
        "helper-outlives-a-killed-server",
        "After SIGKILL the helper goes on, and keeps its image open.",
        "nbdtarget.devices.helper.launch:main",
        (
            (
                "    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)\n",
                "",
            ),
        ),
        LAUNCH,
        hangs=True,
    ),
    Mutant(
        "helper-started-after-its-server-has-ended",
        "The server is killed between fork and prctl, and the helper goes on.",
        "nbdtarget.devices.helper.launch:main",
        (("if os.getppid() != parent:", "if False:"),),
        LAUNCH,
    ),
    Mutant(
        "helper-told-another-pid",
        "qemu-nbd and nbdkit do not look at the socket then, and listen on TCP port 10809 for everybody.",
        "nbdtarget.devices.helper.launch:main",
        (('"LISTEN_PID": str(os.getpid())', '"LISTEN_PID": str(os.getppid())'),),
        LAUNCH,
    ),
    Mutant(
        "socket-of-a-helper-keeps-its-name",
        "What a helper serves can be reached by a name, and a folder is left over.",
        "nbdtarget.devices.helper.process:PrivateSocket.__init__",
        (
            ('os.unlink("s", dir_fd=entry)', "pass"),
            ("                os.rmdir(directory)\n", ""),
        ),
        PROCESS,
    ),
    Mutant(
        "words-of-a-helper-not-logged",
        "A helper that complains is not heard.",
        "nbdtarget.devices.helper.process:Helper._note",
        (
            (
                '            log.warning("%s: %s: %s", self._name, self.program, self.last_words)\n',
                "            pass\n",
            ),
        ),
        PROCESS,
    ),
    Mutant(
        "words-of-a-helper-not-bounded",
        "A helper that complains without end fills the log.",
        "nbdtarget.devices.helper.process:Helper._note",
        (("if self._nr_lines <= LINES_MAX:", "if True:"),),
        PROCESS,
    ),
    Mutant(
        "helper-that-ignores-sigterm-not-killed",
        "The server waits for it for ever, or leaves it behind.",
        "nbdtarget.devices.helper.process:Helper._end",
        (("(signal.SIGTERM, signal.SIGKILL)", "(signal.SIGTERM,)"),),
        PROCESS,
        hangs=True,
    ),
    Mutant(
        "two-starts-of-a-helper-make-two",
        "The first process is forgotten, and outlives the server's work with it.",
        "nbdtarget.devices.helper.process:Helper.start",
        (("async with self._turn:", "if True:"),),
        PROCESS,
    ),
    Mutant(
        "helper-started-after-its-close",
        "A start that the close overtakes leaves a process behind.",
        "nbdtarget.devices.helper.process:Helper._start",
        (("if self._is_closing:", "if False:"),),
        PROCESS,
    ),
    Mutant(
        "what-a-helper-has-started-is-left-behind",
        "A helper that ends leaves its own children.",
        "nbdtarget.devices.helper.process:Helper._wait",
        (("        kill_all(process)\n", ""),),
        PROCESS,
        hangs=True,
    ),
    Mutant(
        "restart-of-a-helper-without-back-off",
        "A helper that dies at once is started thousands of times.",
        "nbdtarget.devices.nbd.device:NbdDevice._connect_again",
        (("delay_s = min(2 * delay_s, RECONNECT_S_MAX)", "delay_s = 0.0"),),
        DEVICE,
    ),
    Mutant(
        "replaced-image-read-by-the-next-helper",
        "A helper is started again, and reads another image: the clone is half of one and half of the other.",
        "nbdtarget.devices.helper.device:HelperDevice._connect_same",
        (
            (
                "if difference := source.state.difference(found):",
                'if difference := "":',
            ),
        ),
        DEVICE,
        hangs=True,
    ),
    Mutant(
        "image-replaced-while-it-is-opened",
        "What is recorded of the image is not what the helper has opened.",
        "nbdtarget.devices.helper.device:_Source.open",
        (("if difference := before.difference(self.state):", 'if difference := "":'),),
        DEVICE,
    ),
    Mutant(
        "replaced-image-given-up-for-a-while-only",
        "The device goes on trying, and takes the other image when its time is as before.",
        "nbdtarget.devices.nbd.device:NbdDevice._connect_again",
        (("while self._is_lost and not self.changed:", "while self._is_lost:"),),
        DEVICE,
    ),
    Mutant(
        "state-of-an-image-has-no-inode",
        "A file that was put in the place of the image, with the same size and time, is not noticed.",
        "nbdtarget.devices.helper.state:_file_state",
        (('        "place": f"{status.st_dev}:{status.st_ino}",\n', ""),),
        STATE,
    ),
    Mutant(
        "change-of-a-container-not-told",
        "The file on the web server is another one, and the clone waits for it instead of saying so.",
        "nbdtarget.devices.helper.device:HelperDevice.__init__",
        (
            (
                "            below.health.watchers.append(self._container_changed)\n",
                "",
            ),
        ),
        DEVICE,
        hangs=True,
    ),
    Mutant(
        "size-of-a-container-rounded-up",
        "Formats with a footer look for it from the end.",
        "nbdtarget.devices.helper.container:_Exports.__init__",
        (("device.exact_size", "device.size"),),
        CONTAINER,
    ),
    Mutant(
        "container-reads-without-a-bound",
        "A helper that asks for much fills the memory of the server.",
        "nbdtarget.devices.helper.container:_Client._converse",
        (("                await self._room.acquire()\n", ""),),
        CONTAINER,
    ),
    Mutant(
        "reads-not-held-while-a-helper-is-away",
        "A guest gets an error for every helper that dies, and gives its disk up.",
        "nbdtarget.devices.helper.device:HelperDevice",
        (("    holds_reads = True\n", ""),),
        DEVICE,
    ),
    Mutant(
        "held-reads-forgotten",
        "A read that waited for a helper waits for ever.",
        "nbdtarget.devices.nbd.device:NbdDevice._connect_once",
        (("        self._held.resume(self.submit)\n", ""),),
        DEVICE,
        hangs=True,
    ),
    Mutant(
        "held-reads-wait-for-ever",
        "`source-timeout` has no effect.",
        "nbdtarget.devices.nbd.device:NbdDevice._connect_again",
        (("            self._held.expire()\n", ""),),
        DEVICE,
        hangs=True,
    ),
    Mutant(
        "rbd-image-that-is-written-to-taken",
        "An image that changes is copied: half of one state and half of another.",
        "nbdtarget.devices.helper.rbd_info:look_at_rbd",
        (("    if locks:\n", "    if False:\n"),),
        RBD,
    ),
    Mutant(
        "snapshot-of-rbd-not-recognised",
        "A snapshot that was made again under the same name is taken for the old one.",
        "nbdtarget.devices.helper.state:look_at_image",
        (
            (
                '            ids["snapshot-id"] = state.snapshot_id\n',
                "            pass\n",
            ),
        ),
        STATE,
    ),
    Mutant(
        "helpers-start-for-a-table-over-tcp",
        "Who has a token for a control socket on TCP can have programs started.",
        "nbdtarget.devices.helper.scheme:_HelpedScheme",
        (
            (
                "starts_programs: ClassVar[bool] = True",
                "starts_programs: ClassVar[bool] = False",
            ),
        ),
        (f"{HERE}test_scheme.py",),
    ),
)
