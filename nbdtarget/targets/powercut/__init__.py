# SPDX-License-Identifier: Apache-2.0
"""A disk with a volatile write cache that forgets when told to."""
