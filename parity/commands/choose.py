"""From the options to the cases that are meant."""

from __future__ import annotations

import dataclasses
from typing import Protocol, get_args

from parity.case import Case
from parity.cases import TIERS, Tier, cases_of
from parity.cases.meshes import world_cases
from parity.commands.expression import compile_expression
from parity.errors import CannotRun, NoCaseMatches, WorldNotInTier

LARGEST_WORLD = 16
"""As many ranks as one host is asked to run."""


class Choice(Protocol):
    """What the command line says of cases."""

    tier: str
    keep: str
    world: str
    seed: int


def choose(choice: Choice) -> list[Case]:
    """The cases of a tier that match the expression and the world sizes; a whole identifier matches its case alone.

    Raises:
        CannotRun: an unknown tier, a world size that no case has, or nothing left.
    """
    asked = _worlds(choice.world)
    tier = cases_of(_tier(choice.tier))
    known = {case.world for case in tier}
    tier += [case for world in sorted(asked - known) for case in world_cases(world)]
    cases = [dataclasses.replace(case, seed=choice.seed) for case in tier]
    worlds = asked or known
    matches = compile_expression(choice.keep) if choice.keep else lambda _: True
    named = [case for case in cases if case.id == choice.keep]
    chosen = [case for case in named or cases if case.world in worlds and matches(case)]
    if not chosen:
        raise NoCaseMatches(
            f"no case of the {choice.tier} tier matches -k {choice.keep!r} at world {choice.world or 'any'}",
            hint="dora-parity list shows them",
        )
    return chosen


def find(text: str, tier: str) -> Case:
    """The one case of that identifier.

    Raises:
        NoCaseMatches: there is none.
    """
    for case in cases_of(_tier(tier)):
        if case.id == text:
            return case
    raise NoCaseMatches(f"no case is called {text!r}", hint="dora-parity list shows the identifiers")


def _tier(name: str) -> Tier:
    if name not in TIERS:
        raise CannotRun(f"--tier {name!r} is unknown", hint=f"one of {', '.join(get_args(Tier))}")
    return name


def _worlds(text: str) -> set[int]:
    """The world sizes that are asked for; none where nothing is said. A world that no case has gets cases of its own.

    Raises:
        CannotRun: what is given is no list of numbers from 1 to 16.
    """
    if not text:
        return set()
    try:
        asked = {int(part) for part in text.split(",")}
    except ValueError:
        raise CannotRun(f"--world {text!r} is not a list of numbers", hint="as in --world 1,2,4") from None
    beyond = sorted(asked - set(range(1, LARGEST_WORLD + 1)))
    if beyond:
        raise WorldNotInTier(f"--world {beyond[0]} is not a world from 1 to {LARGEST_WORLD}", hint="choose among them")
    return asked
