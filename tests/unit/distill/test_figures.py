"""One writer of pictures: the bytes depend on the figure alone."""

from matplotlib.figure import Figure

from isthmus.distill.figures import png


def drawn(values: list[float]) -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot(values)
    return figure


def test_the_same_figure_gives_the_same_png() -> None:
    first = png(drawn([1, 2, 3]))
    assert first.startswith(b"\x89PNG\r\n\x1a\n")
    assert first == png(drawn([1, 2, 3]))
    assert first != png(drawn([3, 2, 1]))
    assert b"Software" not in first


def test_the_width_follows_the_dots_per_inch() -> None:
    assert int.from_bytes(png(drawn([1, 2]), dpi=50)[16:20], "big") == 100
