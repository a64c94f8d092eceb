# SPDX-License-Identifier: Apache-2.0
"""Check, dump, restore, salvage and import, for both kinds."""
