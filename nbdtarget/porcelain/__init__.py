# SPDX-License-Identifier: Apache-2.0
"""Jobs of the command line: `clone`, `cache` and `uncache`.

    look    what a plan looks at: sizes, locks, data where none should be
    job     prepare, serve, end: what clone and cache have in common
    clone, cache, uncache
            one job each

Nothing is imported here: `uncache` only talks to a server, and needs none of one.
"""
