# SPDX-License-Identifier: Apache-2.0
"""Puts the compiled fast path into a wheel, if it can be built; without it the wheel is for any machine."""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# A build runs this file alone, not as a part of the package `scripts`.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.build_fast import BuildError, build

__all__ = ["FastPathHook"]


class FastPathHook(BuildHookInterface):  # type: ignore[type-arg]
    """See the module head."""

    PLUGIN_NAME = "custom"
    _folder = ""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        self._folder = tempfile.mkdtemp()
        try:
            built = build(Path(self._folder))
        except BuildError as error:
            print(f"a wheel without the compiled fast path: {error}", file=sys.stderr)
            return
        for module in built:
            build_data["force_include"][str(module)] = module.name
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(
        self, version: str, build_data: dict[str, Any], artifact_path: str
    ) -> None:
        if self._folder:
            shutil.rmtree(self._folder)
