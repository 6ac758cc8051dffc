import os
from pathlib import Path

import pytest

# Tests in several processes share the cores: torch and what a test starts are told so before they are loaded.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real tokenizers, models and text that some tests need."""
    folder = os.environ.get("CAPGAP_TEST_DATA")
    if not folder:
        pytest.skip("set CAPGAP_TEST_DATA to the folder of real test data (see CONTRIBUTING.md)")
    return Path(folder)
