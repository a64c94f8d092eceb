# SPDX-License-Identifier: Apache-2.0
"""The configuration file of `serve`: what it says, where it is wrong, how it is carried out."""
