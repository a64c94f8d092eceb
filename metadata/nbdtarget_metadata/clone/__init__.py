# SPDX-License-Identifier: Apache-2.0
"""The metadata of a clone: which regions are hydrated."""
