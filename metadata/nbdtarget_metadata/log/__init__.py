# SPDX-License-Identifier: Apache-2.0
"""What every kind of metadata stands on: envelopes, superblocks, chains of records, commits."""
