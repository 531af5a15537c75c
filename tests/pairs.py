"""Which cells of training run on which layouts: a promise, and a choice that keeps it with few pairs. Pure functions.

The promise, in float64: every cell runs on the first layout and on one more; every feature that a cell shows meets every
layout that can show it.
"""

from collections.abc import Callable, Mapping, Sequence

Pair = tuple[str, str]  # layout, cell
Column = tuple[str, str]  # strategy, dtype


def chosen(
    layouts: Sequence[str], cells_of: Callable[[str], Sequence[str]], features: Mapping[str, Sequence[str]],
    cost: Mapping[str, float],
) -> list[Pair]:  # fmt: skip
    """Pairs that keep the promise. `layouts`: of the others the cheapest comes first. `cells_of`: what a layout can run;
    `features`: the cells that show each; `cost`: of the cells that take longer than 1, as most do."""
    first, *others = layouts
    pairs = [(first, cell) for cell in cells_of(first)]
    for layout in others:
        pairs += [(layout, cell) for cell in cover(cells_of(layout), features, cost, _counts(pairs))]
    for cell in cells_of(first):
        able = [layout for layout in others if cell in cells_of(layout)]
        if able and not any((layout, cell) in pairs for layout in others):
            pairs.append((able[0], cell))
    return pairs


def cover(
    cells: Sequence[str], features: Mapping[str, Sequence[str]],
    cost: Mapping[str, float] = {}, counts: Mapping[str, int] = {},
) -> list[str]:  # fmt: skip
    """Cells that show every feature: the one that adds most for its cost comes next, of equal ones the rarest so far."""
    missing, found = {feature for feature, shown in features.items() if set(shown) & set(cells)}, []
    while missing:

        def worth(cell: str) -> tuple[float, int]:
            return sum(cell in features[feature] for feature in missing) / cost.get(cell, 1.0), -counts.get(cell, 0)

        found.append(max(cells, key=worth))
        missing = {feature for feature in missing if found[-1] not in features[feature]}
    return found


def _counts(pairs: Sequence[Pair]) -> dict[str, int]:
    return {cell: sum(pair[1] == cell for pair in pairs) for _, cell in pairs}


def missing(
    pairs: Sequence[Pair], layouts: Sequence[str], cells_of: Callable[[str], Sequence[str]],
    features: Mapping[str, Sequence[str]],
) -> list[str]:  # fmt: skip
    """What is promised and not among the pairs."""
    first, *others = layouts
    lines = [f"{cell} on {first}" for cell in cells_of(first) if (first, cell) not in pairs]
    for cell in cells_of(first):
        able = [layout for layout in others if cell in cells_of(layout)]
        if able and not any((layout, cell) in pairs for layout in able):
            lines.append(f"{cell} on any of {', '.join(able)}")
    for feature, shown in features.items():
        for layout in layouts:
            able = set(shown) & set(cells_of(layout))
            if able and not any((layout, cell) in pairs for cell in able):
                lines.append(f"{feature} on {layout}")
    return lines


def table(pairs: Sequence[Pair], layouts: Sequence[str], features: Mapping[str, Sequence[str]]) -> str:
    """Features x layouts: by how many of the pairs each is shown."""
    width = max(map(len, features))
    lines = [f"{'':{width}}  {'  '.join(layouts)}"]
    for feature, shown in features.items():
        counts = [sum((layout, cell) in pairs for cell in shown) for layout in layouts]
        marks = "  ".join(f"{count or '-':>{len(layout)}}" for count, layout in zip(counts, layouts, strict=True))
        lines.append(f"{feature:{width}}  {marks}")
    return "\n".join(lines)


def in_parts(columns: Mapping[Column, Sequence[str]], size: int) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """(strategy, dtype, cell, the cells that one process computes with it) of every cell of the columns."""
    return [
        (*column, cell, tuple(cells[i - i % size : i - i % size + size]))
        for column, cells in columns.items()
        for i, cell in enumerate(cells)
    ]
