"""The rows as a picture: each ratio as a bar beside its limit, with the numbers."""

from pathlib import Path

from parity.bench.measure import Row
from parity.errors import CannotRun

HOLDS, FALLS_SHORT = "#2a7f62", "#b3352d"


def draw(rows: list[Row], place: Path) -> None:
    """Write an image in the format that the name's ending says (svg, png, pdf); empty axes where there is no row yet.

    Raises:
        CannotRun: it cannot be written there.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - the command line should not wait for it

    figure = Figure(figsize=(8, 0.42 * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots()
    for height, row in enumerate(rows):
        axes.barh(height, row.ratio, height=0.6, color=HOLDS if row.holds else FALLS_SHORT)
        axes.plot([row.limit] * 2, [height - 0.4, height + 0.4], color="black", linewidth=2)
        axes.text(max(row.ratio, row.limit) + 0.02, height, f"{row.ratio:.2f} of {row.limit:.2f}", va="center")
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max([1.0, *(row.ratio for row in rows), *(row.limit for row in rows)]))
    axes.set_xlabel("ours / peer, median of the rounds' ratios; the black mark is the limit")
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(place, metadata={"Date": None} if place.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise CannotRun(f"--plot {place} cannot be written: {error}", hint="name a .svg or .png file") from error
