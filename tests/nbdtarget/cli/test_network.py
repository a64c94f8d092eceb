# SPDX-License-Identifier: Apache-2.0
"""The options of TLS, which each command that serves has."""

import pytest
import typer
from typer.testing import CliRunner

from nbdtarget.cli.network import NO_NETWORK, Network, takes_network
from nbdtarget.daemon.security import SecurityOptions
from nbdtarget.server.tls import TlsOptions


def said(*words: str) -> Network:
    """Return the value that a command gets for these words."""
    got: list[Network] = []
    app = typer.Typer()

    @app.command()
    @takes_network
    def serve(first: str, network: Network = NO_NETWORK) -> int:
        """Serve."""
        assert first == "disk"
        got.append(network)
        return 0

    done = CliRunner().invoke(app, ["disk", *words])
    assert done.exit_code == 0, done.output
    return got[0]


def test_nothing_said_is_nothing_wanted() -> None:
    assert said() == NO_NETWORK
    assert NO_NETWORK.options() == SecurityOptions()


def test_everything_said() -> None:
    network = said(
        *["--tls", "on", "--tls-certificates", "pki", "--tls-verify-peer"],
        *["--access", "rw any", "--access", "ro tls"],
    )
    assert network.options() == SecurityOptions(
        TlsOptions("on", "pki", True), ("rw any", "ro tls")
    )


@pytest.mark.parametrize("option", ["--tls-psk", "--tls-certificates"])
def test_file_is_taken_as_it_is_written(option: str) -> None:
    options = said(option, "./x").options().tls
    assert "./x" in (options.psk, options.certificates)
