# SPDX-License-Identifier: Apache-2.0
"""Throw-away writable copies of one image, which can be reset while clients are attached."""
