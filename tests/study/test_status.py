import pytest

from capgap.errors import StudyError
from capgap.study import create_study, study_status
from shell import capgap_here
from study.small import study


def test_a_queue_that_is_not_there_is_said_to_be_and_none_is_made(tmp_path):
    create_study(study(), tmp_path)
    assert study_status(tmp_path).counts == {"waiting": 4}
    (tmp_path / "study.db").unlink()
    with pytest.raises(
        StudyError, match=r"study\.db: the study's queue is not there; .* capgap study resume .* makes it"
    ):
        study_status(tmp_path)
    assert not (tmp_path / "study.db").exists()
    told = capgap_here("study", "status", str(tmp_path), cwd=tmp_path)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr.startswith("error: ")
    create_study(study(), tmp_path)
    assert study_status(tmp_path).counts == {"waiting": 4}
