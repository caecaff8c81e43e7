import pytest
from helpers import faults

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def answers():
    return faults.answers()


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.what)
def test_the_command_refuses_with_the_right_status_and_message(fault, answers):
    given = answers[fault.what]
    assert fault.words in given.message
    assert given.status == fault.status
    assert given.message.count("\n") == 0
    assert given.message.startswith("error: ")


@pytest.mark.parametrize("fault", faults.FAULTS, ids=lambda fault: fault.what)
def test_a_refusal_leaves_nothing_behind(fault, answers):
    assert answers[fault.what].left == ()


def test_the_table_of_the_document_is_what_the_command_says(answers):
    assert faults.written_table() == faults.table(answers)
