"""Implementations with one bug planted. One that survives means that the suite proves nothing about that bug."""

from __future__ import annotations

from parity.implementations.mutants.base import Mutant
from parity.implementations.mutants.files import FILE_MUTANTS
from parity.implementations.mutants.layer import LAYER_MUTANTS
from parity.implementations.mutants.sharding import SHARDING_MUTANTS
from parity.implementations.mutants.storage import STORAGE_MUTANTS
from parity.implementations.mutants.training import TRAINING_MUTANTS

MUTANTS: dict[str, type[Mutant]] = {
    mutant.__name__: mutant
    for mutant in (*LAYER_MUTANTS, *STORAGE_MUTANTS, *SHARDING_MUTANTS, *TRAINING_MUTANTS, *FILE_MUTANTS)
}

__all__ = ["MUTANTS", "Mutant"]
