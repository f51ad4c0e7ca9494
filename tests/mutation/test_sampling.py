"""Which mutants come first."""

from collections import Counter

from operators import mutants_of
from sampling import _added, in_order

SHORT = mutants_of("short.py", b"x = 1\n" * 10)
LONG = mutants_of("long.py", b"x = 1\n" * 40)


def test_a_sample_has_every_files_share():
    """Of the first fifth, a file's share is not its share of the whole."""
    sample = in_order([*SHORT, *LONG], seed=0, changed={})[:10]

    assert Counter(mutant.file for mutant in sample) == {"short.py": 2, "long.py": 8}


def test_a_seed_gives_one_order():
    """The same seed gives another order, or another seed the same."""
    orders = [in_order(LONG, seed=seed, changed={}) for seed in (1, 1, 2)]

    assert orders[0] == orders[1] != orders[2]


def test_changed_lines_come_first():
    """A mutant on a line that did not change comes before one that did."""
    order = in_order([*SHORT, *LONG], seed=0, changed={"long.py": {7, 9}})

    assert [(mutant.file, mutant.line) for mutant in order[:2]] in (
        [("long.py", 7), ("long.py", 9)],
        [("long.py", 9), ("long.py", 7)],
    )


def test_a_diff_names_the_lines_it_adds():
    """Lines of a hunk are miscounted, or a removed file's are taken for another's."""
    lines = _added(
        "--- a/x.py\n+++ b/x.py\n@@ -3 +4,2 @@\n-a\n+b\n+c\n@@ -9,2 +11,0 @@\n-d\n-e\n@@ -20 +20 @@\n-f\n+g\n"
    )

    assert lines == {"x.py": {4, 5, 20}}
