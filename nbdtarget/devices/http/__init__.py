# SPDX-License-Identifier: Apache-2.0
"""`http://` and `https://`: files on web servers."""
