"""Tables in LaTeX: booktabs, on request as a float with caption and label, and with numbers for siunitx."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from flatcl.utils.reports.cells import BEST, TIE, TIE_MARK, Cell, Number
from flatcl.utils.reports.groups import NOTHING

GREEK = {chr(ord("α") + i): f"${chr(92)}{name}$" for i, name in enumerate((
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi",
    "omicron", "pi", "rho", "varsigma", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega",
)) if name != "omicron"}  # fmt: skip
GREEK |= {
    capital: f"${chr(92)}{name}$"
    for capital, name in zip(
        "ΓΔΘΛΞΠΣΥΦΨΩ",
        ("Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega"),
        strict=True,
    )
}
GREEK |= dict(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΧο", "ABEZHIKMNOPTXo", strict=True))  # which look like Latin letters
SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$", TIE_MARK: r"$\dagger$",
    NOTHING: "--", **GREEK, **{char: f"\\{char}" for char in "_%&#$"},
}  # fmt: skip
SETUP = r"\sisetup{separate-uncertainty = true, detect-weight = true}"


@dataclass(frozen=True)
class Options:
    """`caption` or `label`: the table is a float. `siunitx`: columns of numbers are aligned by siunitx."""

    caption: str | None = None
    label: str | None = None
    siunitx: bool = False


PLAIN = Options()


def document(
    head: Sequence[str], body: Sequence[Sequence[Cell]], num_keys: int, footing: Sequence[str], options: Options
) -> str:
    """The table with its footing: as comments above a bare tabular, below it in a float."""
    text = tabular(head, body, num_keys, options.siunitx)
    packages = r"% \usepackage{booktabs,siunitx}" if options.siunitx else r"% \usepackage{booktabs}"
    if options.caption is None and options.label is None:
        notes = "".join(f"% {latex_text(line)}\n" for line in footing)
        return notes + (f"{packages}\n" if options.siunitx else "") + text
    caption = [] if options.caption is None else [rf"\caption{{{latex_text(options.caption)}}}"]
    label = [] if options.label is None else [rf"\label{{{options.label}}}"]
    notes = [rf"\par\smallskip\footnotesize {'; '.join(map(latex_text, footing))}."] if footing else []
    lines = [packages, r"\begin{table}", r"\centering", *caption, *label, text.rstrip("\n"), *notes, r"\end{table}"]
    return "\n".join(lines) + "\n"


def tabular(head: Sequence[str], body: Sequence[Sequence[Cell]], num_keys: int, siunitx: bool = False) -> str:
    columns = [_column([row[i] for row in body], siunitx) for i in range(num_keys, len(head))]
    titles = [f"{{{latex_text(title)}}}" if column.startswith("S") else latex_text(title)
              for title, column in zip(head[num_keys:], columns, strict=True)]  # fmt: skip
    lines = [_line([*map(latex_text, head[:num_keys]), *titles])]
    lines.append("\\midrule\n")
    for row in body:
        keys = [latex_text(str(cell)) for cell in row[:num_keys]]
        numbers = (_cell(cell, column, siunitx) for cell, column in zip(row[num_keys:], columns, strict=True))
        lines.append(_line([*keys, *numbers]))
    spec = "l" * num_keys + "".join(columns)
    text = f"\\begin{{tabular}}{{{spec}}}\n\\toprule\n{''.join(lines)}\\bottomrule\n\\end{{tabular}}\n"
    return f"{{{SETUP}\n{text}}}\n" if siunitx else text


def _line(cells: Sequence[str]) -> str:
    text = " & ".join(cells)
    guard = "{}" if text.startswith(("[", "*")) else ""  # which would belong to the end of the line before
    return guard + text + r" \\" + "\n"


def _column(cells: Sequence[Cell], siunitx: bool) -> str:
    """S with the room for its numbers, where each cell is one number at most; else r."""
    numbers = [number for cell in cells if isinstance(cell, tuple) for number in cell if _is_number(number)]
    simple = all(cell == "" or (isinstance(cell, tuple) and len(cell) == 1 and not cell[0].interval) for cell in cells)
    if not (siunitx and numbers and simple):
        return "r"
    parts = [number.mean.replace(",", "").lstrip("+-").partition(".") for number in numbers]
    sign = "-" if any(number.mean.startswith("-") for number in numbers) else ""
    whole, places = (max(len(part[i]) for part in parts) for i in (0, 2))
    spread = max(len(number.std.replace(".", "").replace(",", "").lstrip("0")) for number in numbers)
    post = r", table-space-text-post = $^\dagger$" if any(number.mark == TIE for number in numbers) else ""
    room = f"{sign}{whole}" + (f".{places}" if places else "") + (f"({spread})" if spread else "")
    return f"S[table-format = {room}{post}]"


def _cell(cell: Cell, column: str, siunitx: bool) -> str:
    if isinstance(cell, str):
        return _math(cell)
    if column == "r":
        return " / ".join(_number(number, siunitx) for number in cell)
    (number,) = cell
    if not _is_number(number):
        return f"{{{latex_text(number.mean)}}}"
    dagger = r" $^\dagger$" if number.mark == TIE else ""
    return (r"\bfseries " if number.mark == BEST else "") + _for_siunitx(number) + dagger


def _number(number: Number, siunitx: bool) -> str:
    """A number in an ordinary column."""
    text = rf"\num{{{_for_siunitx(number)}}}" if siunitx and _is_number(number) else _math(number.value)
    if number.interval:
        text += " [" + ", ".join(rf"\num{{{end}}}" if siunitx else _math(end) for end in number.interval) + "]"
    if number.mark == BEST:
        return rf"{{\bfseries {text}}}" if siunitx else rf"\textbf{{{text}}}"
    return text + (r"$^\dagger$" if number.mark == TIE else "")


def _for_siunitx(number: Number) -> str:
    mean, std = (text.replace(",", "") for text in (number.mean, number.std))
    return f"{mean} +- {std}" if std else mean


def _is_number(number: Number) -> bool:
    return re.fullmatch(r"[+-]?[\d,]+(\.\d+)?", number.mean) is not None


def _math(text: str) -> str:
    """Text with signs of minus and plus in place of hyphens."""
    return "".join(f"${part}$" if part in ("+", "-") else latex_text(part) for part in re.split("([+-])", text))


def latex_text(text: str) -> str:
    """Text in which no character has a meaning for LaTeX."""
    return "".join(SPECIAL.get(char, char) for char in text)
