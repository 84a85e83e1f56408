"""Tables as GitHub Markdown and as LaTeX (booktabs), every text escaped."""

import re
from collections.abc import Sequence

from transfer.results import cells
from transfer.results.reference import Reference
from transfer.results.table import KINDS, Row, Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': r"\textquotedbl{}",
    "\u00b1": r"$\pm$",
}


def escape_markdown(text: str) -> str:
    """Return text that GitHub shows as it is, also inside a table cell."""
    escaped = re.sub(r"([\\`*_{}\[\]<>|~#])", r"\\\1", text)
    return escaped.replace("\n", " ")


def escape_latex(text: str) -> str:
    """Return text that LaTeX prints as it is; the quotation mark needs the T1 font encoding."""
    return "".join(_LATEX.get(character, character) for character in text).replace("\n", " ")


def render_markdown(tables: Sequence[Table], reference: Reference) -> str:
    """Return all tables as GitHub Markdown: our rows are bold."""
    return "\n\n".join(_markdown_table(table, reference) for table in tables) + "\n"


def _markdown_table(table: Table, reference: Reference) -> str:
    heads = ["pretraining", "epochs", *(table.heads[metric] for metric in table.metrics), "source, notes"]
    lines = [
        f"### {escape_markdown(table.title)}",
        "",
        escape_markdown(cells.subtitle(table, reference.recipes.get(table.recipe or ""))),
        "",
        _markdown_line([escape_markdown(head) for head in heads]),
        _markdown_line([":---", "---:", *("---:" for _ in table.metrics), ":---"]),
    ]
    lines += [_markdown_line(_markdown_cells(table, row)) for kind in KINDS for row in table.rows_of(kind)]
    lines += ["", *(f"- {escape_markdown(remark)}" for remark in table.remarks)]
    if table.rows_of("departed"):
        lines.append(f"- Rows named in italics: {escape_markdown(cells.KIND_TITLES['departed'])}.")
    lines += [f"- \\[{number}\\] {escape_markdown(text)}" for number, text in table.citations]
    lines += [f"- ({letter}) {escape_markdown(text)}" for letter, text in table.notes]
    return "\n".join(lines)


def _markdown_cells(table: Table, row: Row) -> list[str]:
    name = escape_markdown(row.name)
    if row.num_runs > 1:
        name += f" ({row.num_runs} runs)"
    numbers = [escape_markdown(cells.whole(row.cells.get(metric))) for metric in table.metrics]
    if row.kind == "ours":
        name, numbers = f"**{name}** (ours)", [f"**{text}**" for text in numbers]
    elif row.kind == "departed":
        name = f"*{name}* (ours, other protocol)"
    cited = f"\\[{','.join(str(citation) for citation in row.citations)}\\]" if row.citations else ""
    noted = f"({','.join(row.notes)})" if row.notes else ""
    return [name, cells.epochs(row), *numbers, " ".join(filter(None, (cited, noted)))]


def _markdown_line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def render_latex(tables: Sequence[Table], reference: Reference) -> str:
    r"""Return all tables as LaTeX for `\input`; the document needs booktabs, graphicx and fontenc with T1."""
    head = "% needs \\usepackage{booktabs}, \\usepackage{graphicx} and \\usepackage[T1]{fontenc}\n"
    return head + "\n\n".join(_latex_table(table, reference) for table in tables) + "\n"


def _latex_table(table: Table, reference: Reference) -> str:
    heads = ["pretraining", "epochs", *(table.heads[metric] for metric in table.metrics), ""]
    subtitle = escape_latex(cells.subtitle(table, reference.recipes.get(table.recipe or "")))
    label = re.sub(r"[^a-z0-9]+", "-", f"{table.task}-{table.recipe or 'none'}".lower())
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(table.title)} ({subtitle})}}",
        rf"\label{{tab:{label}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{lr{'l' * len(table.metrics)}l}}",
        r"\toprule",
        " & ".join(escape_latex(head) for head in heads) + r" \\",
    ]
    for kind in KINDS:
        rows = table.rows_of(kind)
        if rows:
            title = rf"\multicolumn{{{len(heads)}}}{{l}}{{\itshape {escape_latex(cells.KIND_TITLES[kind])}}} \\"
            lines += [r"\midrule", title]
            lines += [" & ".join(_latex_cells(table, row)) + r" \\" for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}}", r"\par\smallskip\raggedright\footnotesize"]
    legend = [escape_latex(remark) for remark in table.remarks]
    legend += [rf"[{number}] {escape_latex(text)}" for number, text in table.citations]
    legend += [rf"\textsuperscript{{{letter}}}\,{escape_latex(text)}" for letter, text in table.notes]
    return "\n".join([*lines, "\\par\n".join(legend), r"\end{table}"])


def _latex_cells(table: Table, row: Row) -> list[str]:
    name = escape_latex(row.name) + (f" ({row.num_runs} runs)" if row.num_runs > 1 else "")
    # A minus sign, not a hyphen, before a difference.
    numbers = [escape_latex(cells.whole(row.cells.get(metric))).replace("(-", "($-$") for metric in table.metrics]
    if row.kind == "ours":
        name, numbers = rf"\textbf{{{name}}}", [rf"\textbf{{{text}}}" for text in numbers]
    else:
        name = f"{{{name}}}"  # after a line end LaTeX would take "[" or "*" for an argument
    cited = f"[{','.join(str(citation) for citation in row.citations)}]" if row.citations else ""
    noted = rf"\textsuperscript{{{','.join(row.notes)}}}" if row.notes else ""
    return [name, cells.epochs(row), *numbers, f"{{{cited}}}{noted}" if cited or noted else ""]
