# SPDX-License-Identifier: Apache-2.0
"""The process: it opens, serves, reloads, and stops in order."""
