"""The command line, in a process of its own or in this one."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from capgap.cli.app import main


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


def capgap_here(*words: str, cwd: Path, data: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The same within this process, which saves the seconds that a new one takes to import its libraries."""
    out, told = io.StringIO(), io.StringIO()
    given = {} if data is None else {"CAPGAP_TEST_DATA": str(data)}
    status: object = 0
    with (
        contextlib.chdir(cwd),
        mock.patch.dict(os.environ, given),
        mock.patch.object(sys, "argv", ["capgap", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(told),
    ):
        try:
            main()
        except SystemExit as ended:
            status = ended.code
    return subprocess.CompletedProcess(["capgap", *words], int(str(status or 0)), out.getvalue(), told.getvalue())
