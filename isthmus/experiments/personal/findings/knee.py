"""PURE: the knee of accuracy against bytes: the strongest compression whose loss is within noise."""

from collections.abc import Mapping, Sequence

from isthmus.experiments.personal.cells.cells import Cell
from isthmus.experiments.personal.findings.paired import difference


def knee(cells: Sequence[Cell], bytes_of: Mapping[str, Mapping[str, int]]) -> tuple[str, str]:
    """Return the (ratio, number type) with the fewest bytes for which neither it nor a milder setting loses accuracy
    beyond noise, compared with no compression.

    Milder: the ratio is not higher and the number type has not fewer bytes. Beyond noise: the mean paired loss is more
    than one percentage point and more than two standard errors. Raises ValueError without cells.
    """
    if not cells:
        raise ValueError("no cells, no knee")
    whole = dict(enumerate(cell.plain for cell in cells))
    settings = sorted((size, ratio, kind) for kind, row in bytes_of.items() for ratio, size in row.items())
    losing = []
    for _, ratio, kind in settings:
        loss = difference({i: cell.accuracy[ratio][kind] for i, cell in enumerate(cells)}, whole)
        if loss.mean <= -0.01 and loss.beyond_noise:
            losing.append((ratio, kind))
    for _, ratio, kind in settings:
        if not any(
            float(milder) <= float(ratio) and bytes_of[other][ratio] >= bytes_of[kind][ratio]
            for milder, other in losing
        ):
            return ratio, kind
    return "1", "fp32"
