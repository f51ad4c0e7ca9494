"""`-k` means what its words say, and nothing is chosen by mistake."""

from dataclasses import dataclass

import pytest

from parity.case import TrainCase
from parity.commands.choose import choose, find
from parity.commands.expression import compile_expression
from parity.errors import BadExpression, CannotRun, NoCaseMatches, WorldNotInTier

CASE = TrainCase(
    link="shards",
    inputs="one-hot",
    strategy="fsdp2",
    world=3,
    base="nf4",
    shape_name="thin",
    clauses=("D1", "S11"),
)
"""stack/one-hot/torch_impl/fsdp2-w3/thin/nf4-float32/plain."""


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("fsdp2", True),
        ("fsdp1", False),
        ("fsdp2 and nf4", True),
        ("fsdp2 and bfloat16", False),
        ("fsdp1 or nf4", True),
        ("not fsdp2", False),
        ("not not fsdp2", True),
        ("not fsdp1 and nf4", True),
        ("not nf4 and fsdp1", False),
        ("not (fsdp2 and nf4)", False),
        ("fsdp1 and nf4 or thin", True),
        ("fsdp1 and (nf4 or thin)", False),
        ("thin or fsdp1 and lattice", True),
        ("((fsdp2))", True),
        ("(fsdp2)and(nf4)", True),
        ("stack/one-hot/torch_impl/fsdp2-w3/thin/nf4-float32/plain", True),
        ("S11", True),
        ("S1", False),
        ("D1", True),
    ],
)
def test_an_expression_means_what_it_says(text, meant):
    """Words match a part of the identifier or a whole clause; not binds before and, and before or."""
    assert compile_expression(text)(CASE) is meant


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=text or "nothing")
        for text in ["", "   ", "and", "or nf4", "nf4 or", "nf4 and", "not", "nf4 thin", "(", ")", "()", "(nf4", "nf4)"]
    ]
    + [
        pytest.param(text, id=text)
        for text in ["nf4 not thin", "nf4 and or thin", "not and", "(nf4 and)", "nf4 (thin)"]
    ],
)
def test_a_malformed_expression_is_refused(text):
    """What cannot be read is BadExpression, in one line with the expression and the mend."""
    with pytest.raises(BadExpression) as caught:
        compile_expression(text)

    assert repr(text) in str(caught.value)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Options:
    """What the command line gives."""

    tier: str = "quick"
    keep: str = ""
    world: str = ""
    seed: int = 0


def test_nothing_said_is_the_whole_tier():
    """Without options every case of the tier is chosen."""
    assert len(choose(Options())) >= 100


def test_worlds_are_those_that_were_asked_for():
    """--world 2,3 chooses those worlds and no other."""
    assert {case.world for case in choose(Options(world="2,3"))} == {2, 3}


@pytest.mark.parametrize("world", [5, 7, 9, 16])
def test_a_world_that_no_case_has_gets_cases_of_its_own(world):
    """--world 7 runs: the same stacks, cut into seven."""
    assert {case.world for case in choose(Options(world=str(world)))} == {world}


def test_the_seed_reaches_every_case():
    """--seed 5 changes every case."""
    assert {case.seed for case in choose(Options(keep="thin", seed=5))} == {5}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        pytest.param(Options(tier="huge"), CannotRun, "'huge'", id="tier"),
        pytest.param(Options(world="17"), WorldNotInTier, "world 17", id="world"),
        pytest.param(Options(world="2,sixteen"), CannotRun, "'2,sixteen'", id="no number"),
        pytest.param(Options(world="2,"), CannotRun, "'2,'", id="comma"),
        pytest.param(Options(keep="nosuchword"), NoCaseMatches, "'nosuchword'", id="no case"),
        pytest.param(Options(keep="none-w1", world="2"), NoCaseMatches, "world 2", id="no case of that world"),
        pytest.param(Options(keep="fsdp2 and"), BadExpression, "'fsdp2 and'", id="expression"),
    ],
)
def test_what_cannot_be_chosen_is_refused(options, error, said):
    """A tier, world or expression that leaves nothing is named, with the mend."""
    with pytest.raises(error, match=said) as caught:
        choose(options)

    assert caught.value.hint


def test_a_case_is_found_by_its_identifier():
    """`show` finds the one case of that name."""
    (case,) = choose(Options(keep="stack/one-hot/torch_impl/fsdp2-w2/thin/float32-float32/plain"))

    assert find(case.id, "quick") == case


def test_a_part_of_an_identifier_is_no_case():
    """`show` takes no part of a name."""
    with pytest.raises(NoCaseMatches, match="'stack/one-hot'"):
        find("stack/one-hot", "quick")
