# SPDX-License-Identifier: Apache-2.0
"""Cache policies: which blocks of a cache are cached. They decide; the cache target acts."""
