# SPDX-License-Identifier: Apache-2.0
"""The metadata of a cache: what each cache block holds."""
