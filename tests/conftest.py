import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real tokenizers, models and text that some tests need."""
    folder = os.environ.get("CAPGAP_TEST_DATA")
    if not folder:
        pytest.skip("set CAPGAP_TEST_DATA to the folder of real test data (see CONTRIBUTING.md)")
    return Path(folder)
