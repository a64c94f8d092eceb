# SPDX-License-Identifier: Apache-2.0
"""Helpers for all packages: errors, clocks, words, once-a-turn callbacks, unix sockets."""
