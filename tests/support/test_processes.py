# SPDX-License-Identifier: Apache-2.0
"""The failure of a program tells what the program said."""

import subprocess
import sys

import pytest

from tests.support.processes import tell_output

PROGRAM = "import sys; print('begun'); sys.exit('there is no disk')"


@pytest.mark.parametrize("text", [True, False])
def test_exception_of_a_program_that_failed_has_its_words(text: bool) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        subprocess.run(
            [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=text
        )
    tell_output(caught.value)
    assert caught.value.__notes__ == ["stdout: begun\n", "stderr: there is no disk\n"]
