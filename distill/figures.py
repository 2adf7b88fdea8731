"""Pictures of matplotlib figures as PNG. A figure is made with ``Figure``, never through pyplot's global state."""

from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 110


def png(figure: "Figure", *, dpi: int = DPI) -> bytes:
    """The figure as a PNG file: the same figure gives the same bytes, whatever version drew it."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
