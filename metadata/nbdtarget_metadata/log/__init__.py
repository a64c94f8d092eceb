# SPDX-License-Identifier: Apache-2.0
"""The base of every kind of metadata: envelopes, superblocks, chains of records, commits."""
