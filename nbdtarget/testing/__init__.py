# SPDX-License-Identifier: Apache-2.0
"""Disks for test suites: fixtures for pytest, factories that make more of them, and disks as files.

`nbdtarget.testing.plugin` is the plugin that pytest loads; `nbdtarget.testing.factories` makes fixtures of other sizes and scopes.
"""
