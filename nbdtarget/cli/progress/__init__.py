# SPDX-License-Identifier: Apache-2.0
"""The progress that long-running commands print."""
