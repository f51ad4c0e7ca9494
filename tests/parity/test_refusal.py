"""What must be refused: taking it fails, refusing it without naming what is wrong fails, and so does refusing all."""

import dataclasses

import pytest

from parity.case import RefuseCase
from parity.cases import cases_of
from parity.checks.refusal import NAMED, check_refusal
from parity.implementations.registry import resolve
from parity.workers.refusing import what_is_said

CASES = [case for case in cases_of("quick") if isinstance(case, RefuseCase)]
CASE = next(case for case in CASES if case.bad == "nan-weight")


class Meets:
    """Raises as it is told."""

    def __init__(self, *, on_bad="", on_sound=""):
        self.errors = {True: on_bad, False: on_sound}

    def meet(self, case, *, bad):  # noqa: ARG002 - the protocol's form
        """Raise, or take it."""
        if self.errors[bad]:
            raise ValueError(self.errors[bad])


def passes(said):
    """Whether a refusal in these words is one."""
    return check_refusal(CASE, what_is_said(Meets(on_bad=said), CASE)).passed


def test_a_refusal_that_names_everything_passes():
    """Tensor and index are named."""
    assert passes("layers.1 holds nan at index (3, 5)")


@pytest.mark.parametrize("said", ["", "layers.1 is bad", "a number at (3, 5)"], ids=["taken", "no index", "no tensor"])
def test_a_refusal_that_does_not_fails(said):
    """What is taken, or refused without saying which and where, is no refusal."""
    assert not passes(said)


def test_refusing_what_is_sound_is_an_error():
    """Who refuses everything has shown nothing."""
    with pytest.raises(ValueError, match="no"):
        what_is_said(Meets(on_bad="layers.1 (3, 5)", on_sound="no"), CASE)


def test_everything_bad_has_words_and_a_case():
    """Each bad thing is tried on a subject, and what it must be called is written down."""
    assert {case.bad for case in CASES} == set(NAMED)


@pytest.mark.distributed
def test_a_refusal_goes_through_the_pipeline(pipeline):
    """In a rank too: the sound thing refused is an error of the case, with its reason."""
    (result,) = pipeline.run([(CASE, "fakes:RefusesAll")])

    assert (result.status, "too good" in result.reason) == ("error", True)


def test_who_declares_no_refusals_is_not_asked():
    """A third party's stack is skipped, with the reason."""
    assert "refuse" in resolve("parity.implementations.torch_stack:TorchStack").refuses(CASE)


def test_the_words_do_not_reach_the_identifier_alone():
    """A case says what is bad by name."""
    assert dataclasses.replace(CASE, bad="pickled-adapter").id.endswith("pickled-adapter")
