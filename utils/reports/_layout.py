"""How the pictures of `plots` look, and how they become files: sizes, fonts, colours, legends, equal bytes each time.

A picture has its final size: 8 pt text in it is 8 pt on the page, if it is included without scaling.
"""

import contextlib
import io
import os
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatcl.utils.errors import UsageError
from flatcl.utils.files import user_path
from flatcl.utils.reports.latex import latex_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTHS = {"column": 3.5, "page": 7.0}  # inches
SUFFIXES = (".pdf", ".svg", ".png", ".pgf")
TEX = ("pdflatex", "xelatex", "lualatex")
POINTS = 8
ROW = 0.155  # inches: a line of text, and what is beside it
PNG_DPI = 300
# Okabe & Ito, Color Universal Design (2008): colours that most people with colour-blindness tell apart. Without their
# yellow, which is hard to see as a thin line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")
DASHES = ((0, ()), (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (5, 1.2, 1, 1.2, 1, 1.2)))
INK, GREY, FAINT = "#222222", "#767676", "#dddddd"
SETTINGS = {
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": POINTS,
    **dict.fromkeys(
        ("axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize",
         "legend.title_fontsize", "figure.titlesize"), POINTS),
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.titlepad": 4,
    "axes.labelpad": 2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    **{f"{axis}tick.{name}": value for axis in "xy"
       for name, value in {"color": GREY, "labelcolor": INK, "major.size": 2.5, "major.width": 0.6}.items()},
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "legend.columnspacing": 1.2,
    "legend.labelspacing": 0.25,
    "legend.borderaxespad": 0,
    "text.parse_math": False,  # a name from a file is a name
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "flatcl",
    "pgf.rcfonts": False,
}  # fmt: skip


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Inside, matplotlib has our settings, whatever the user's own are; afterwards it has those again."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


@dataclass(frozen=True)
class Style:
    """How the lines and points of one group are drawn. Marker and dashes alone tell 60 groups apart, without colour."""

    colour: str
    marker: str
    dashes: Any

    @classmethod
    def number(cls, place: int) -> "Style":
        return cls(*(choices[place % len(choices)] for choices in (COLOURS, MARKERS, DASHES)))


class Page:
    """A figure of fixed width whose panels stand in a grid, with its legend below them."""

    def __init__(self, width: str, panels: int, across: int, **options):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.down = -(-panels // across)
        self.across = -(-panels // self.down)  # no more than that number of rows needs
        self.panel_inches = WIDTHS[width] / self.across - 0.5
        figure_size = WIDTHS[width], 2.5 * self.down + 1
        self.figure = Figure(figsize=figure_size, dpi=PNG_DPI, layout="constrained")
        FigureCanvasAgg(self.figure)
        self.figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.03, hspace=0.02)
        grid = self.figure.subplots(self.down, self.across, squeeze=False, **options)
        self.axes: list[Axes] = list(grid.flat)[:panels]
        for unused in list(grid.flat)[panels:]:
            unused.remove()

    def legend(self, handles: Sequence[Any], labels: Sequence[str], **options) -> None:
        """Below the panels, in as few rows as the width allows."""
        count = len(labels)
        for columns in dict.fromkeys(-(-count // -(-count // most)) for most in range(min(count, 8), 0, -1)):
            legend = self.figure.legend(handles, labels, loc="outside lower center", ncols=columns, **options)
            room = self.figure.bbox.width - 0.06 * self.figure.dpi
            box = legend.get_window_extent(self.figure.canvas.get_renderer())
            if columns == 1 or box.width <= room:
                self.figure.set_figheight(self.figure.get_figheight() + box.height / self.figure.dpi)
                return
            legend.remove()

    def fit(self, height: Callable[[float], float]) -> "Figure":
        """Makes the figure as high as it must be for panels of `height(their width)`, in inches, and keeps all things
        where they are from then on."""
        engine, dpi = self.figure.get_layout_engine(), self.figure.dpi
        rows = self.axes[0].get_gridspec().get_height_ratios()  # a change of the whole height is shared by these
        for _ in range(5):
            engine.execute(self.figure)
            box = self.axes[0].get_window_extent()
            missing = sum(rows) / rows[0] * (height(box.width / dpi) - box.height / dpi)
            if abs(missing) < 0.01:
                break
            self.figure.set_figheight(max(self.figure.get_figheight() + missing, 0.5))
        self.figure.set_layout_engine("none")
        return self.figure


def check_path(path: str | os.PathLike) -> Path:
    """Raises `UsageError` for what no picture can be written to."""
    file = user_path(path)
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{path}: a picture's name ends in {', '.join(SUFFIXES)}, got '{suffix or file.name}'.")
    if suffix == ".pgf" and _tex() is None:
        raise UsageError(
            f"{path}: .pgf needs a TeX installation ({', '.join(TEX)}), none is found. Write .pdf or .svg."
        )
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageError(f"{path}: cannot write there. Give a file in a folder that exists and can be written.")
    return file


def _tex() -> str | None:
    return next((name for name in TEX if shutil.which(name)), None)


def save(figure: "Figure", path: str | os.PathLike) -> None:
    """Writes a PDF, SVG, PNG or PGF, as the suffix says: at the figure's size, the same bytes for the same figure, the
    old file or the new one at any moment. Raises `UsageError` for another suffix and where nothing can be written."""
    file = check_path(path)
    fresh = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with style():
            _write(figure, fresh, file.suffix.lower()[1:])
        os.replace(fresh, file)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}. Give a file in a writable folder.") from None
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)


def _write(figure: "Figure", file: Any, format: str) -> None:
    import matplotlib

    dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
    if format != "pgf":
        figure.savefig(file, format=format, dpi=PNG_DPI, metadata=dates[format])
        return
    if any(axes.images for axes in figure.axes):
        raise UsageError("matrices of many tasks are images, which a .pgf cannot hold. Write .pdf or .svg.")
    from matplotlib.backends.backend_pgf import LatexError

    matplotlib.rcParams["pgf.texsystem"] = _tex()
    with _escaped(figure):
        try:
            figure.savefig(file, format="pgf")
        except LatexError as error:
            raise UsageError(
                f"{_tex()} cannot set the texts: {str(error).splitlines()[0]} Write .pdf or .svg."
            ) from None


@contextlib.contextmanager
def _escaped(figure: "Figure") -> Iterator[None]:
    """Inside, the texts are TeX: what is special there is escaped. Labels of ticks come from a formatter."""
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter, FixedLocator

    axes = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    named = [axis for axis in axes if isinstance(axis.get_major_locator(), FixedLocator)]
    formatters = [axis.get_major_formatter() for axis in named]
    texts = {text: text.get_text() for text in figure.findobj(Text) if text.get_text()}
    for axis in named:
        labels = [latex_text(label.get_text()) for label in axis.get_ticklabels()]
        axis.set_major_formatter(FixedFormatter(labels))
    for text, plain in texts.items():
        text.set_text(latex_text(plain))
    try:
        yield
    finally:
        for text, plain in texts.items():
            text.set_text(plain)
        for axis, formatter in zip(named, formatters, strict=True):
            axis.set_major_formatter(formatter)


SVG, LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def svg_text(figure: "Figure", prefix: str, title: str) -> str:
    """An <svg> element for a page of HTML: no prolog, no style that would reach beyond it, all ids begin with `prefix`;
    `title` is read to those who cannot see it."""
    written = io.BytesIO()
    with style():
        figure.savefig(written, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(written.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name == "id":
                element.set(name, f"{prefix}{value}")
            elif name in ("href", f"{{{LINK}}}href") and value.startswith("#"):
                element.set(name, f"#{prefix}{value[1:]}")
            elif "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#{prefix}"))
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")  # what the style element said
    root.set("role", "img")
    label = ElementTree.Element(f"{{{SVG}}}title")
    label.text = title
    root.insert(0, label)
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", LINK)
    return ElementTree.tostring(root, encoding="unicode")
