# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget torture`: does what a program has acknowledged survive a power cut, at any moment?

    recorder   runs the program once, on a file system whose disk records every write and flush
    recording  what was recorded, as a list of flushes with the writes that each of them covers
    cuts       at which flush the power goes, and what of the writes at risk survives
    trials     makes the disk that such a cut leaves, mounts it and runs the check
    shrink     looks for a smaller loss with which the check fails, too
    session    all of this in order

The moments of the cuts are places in the record, and no moments of a clock. So a case that fails can be made again, byte for
byte, on any day and on any machine.
"""
