# SPDX-License-Identifier: Apache-2.0
"""One server process hands over to another one: its sockets, its devices, and its clients, who notice a short pause."""
