"""The command line in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def capgap(
    *words: str, cwd: Path, data: Path | None = None, module: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """`capgap WORDS` in a folder, without the Hub.

    Args:
        data: the test data's folder, as recipes name it.
        module: what starts it instead of Python alone, such as torchrun.
    """
    given = {} if data is None else {"CAPGAP_TEST_DATA": str(data)}
    return subprocess.run(
        [sys.executable, "-m", *module, "capgap", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, **given, "HF_HUB_OFFLINE": "1"},
    )
