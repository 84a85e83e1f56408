"""Tables as GitHub Markdown and as LaTeX (booktabs), every text escaped."""

import re
from collections.abc import Sequence

from transfer.results import cells
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


def render_markdown(tables: Sequence[Table]) -> str:
    """Return all tables as GitHub Markdown: our rows are bold."""
    return "\n\n".join(_markdown_table(table) for table in tables) + "\n"


def _markdown_table(table: Table) -> str:
    heads = ["pretraining", "epochs", *(table.heads[metric] for metric in table.metrics), "source, notes"]
    lines = [
        f"### {escape_markdown(titled(table))}",
        "",
        escape_markdown("; ".join(table.about)),
        "",
        _markdown_line([escape_markdown(head) for head in heads]),
        _markdown_line([":---", "---:", *("---:" for _ in table.metrics), ":---"]),
    ]
    lines += [_markdown_line(_markdown_cells(table, row)) for kind in KINDS for row in table.rows_of(kind)]
    remarks = table.all_remarks if table.shows_differences else table.remarks
    lines += ["", *(f"- {escape_markdown(remark)}" for remark in remarks)]
    if table.rows_of("departed"):
        lines.append(f"- Rows named in italics: {escape_markdown(cells.KIND_TITLES['departed'])}.")
    if table.rows_of("quoted"):
        lines.append(f"- Rows marked as quoted: {escape_markdown(cells.KIND_TITLES['quoted'])}.")
    lines += [f"- \\[{number}\\] {escape_markdown(text)}" for number, text in table.citations]
    lines += [f"- ({letter}) {escape_markdown(text)}" for letter, text in table.notes]
    return "\n".join(lines)


def _markdown_cells(table: Table, row: Row) -> list[str]:
    name = escape_markdown(row.name)
    if runs := cells.runs(row, table.groups):
        name += f" ({runs})"
    numbers = [escape_markdown(text) for text in _numbers(table, row)]
    if row.kind == "ours":
        name, numbers = f"**{name}** (ours)", [text if text == cells.NOTHING else f"**{text}**" for text in numbers]
    elif row.kind == "departed":
        name = f"*{name}* (ours, other protocol)"
    elif row.kind == "quoted":
        name += " (quoted)"
    cited = f"\\[{','.join(str(citation) for citation in row.citations)}\\]" if row.citations else ""
    noted = f"({','.join(row.notes)})" if row.notes else ""
    return [name, cells.epochs(row), *numbers, " ".join(filter(None, (cited, noted)))]


def titled(table: Table) -> str:
    """Return the title, of a paper's table with its id before it."""
    return f"{table.id}: {table.title}" if table.id else table.title


def _numbers(table: Table, row: Row) -> list[str]:
    """Return the cells of the columns in one string each."""
    return [cells.whole(row.cells.get(key), with_difference=table.shows_differences) for key in table.metrics]


def _markdown_line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def render_latex(tables: Sequence[Table]) -> str:
    r"""Return all tables as LaTeX for `\input`; the document needs booktabs, graphicx and fontenc with T1."""
    head = "% needs \\usepackage{booktabs}, \\usepackage{graphicx} and \\usepackage[T1]{fontenc}\n"
    return head + "\n\n".join(_latex_table(table) for table in tables) + "\n"


def _latex_table(table: Table) -> str:
    heads = ["pretraining", "epochs", *(head for group in table.groups for head in group.heads.values()), ""]
    subtitle = escape_latex("; ".join(table.about))
    label = re.sub(r"[^a-z0-9]+", "-", (table.id or f"{table.task}-{table.recipe or 'none'}").lower())
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape_latex(titled(table))} ({subtitle})}}",
        rf"\label{{tab:{label}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{lr{'l' * len(table.metrics)}l}}",
        r"\toprule",
        *_latex_groups(table),
        " & ".join(escape_latex(head) for head in heads) + r" \\",
    ]
    for kind in KINDS:
        rows = table.rows_of(kind)
        if rows:
            title = rf"\multicolumn{{{len(heads)}}}{{l}}{{\itshape {escape_latex(cells.KIND_TITLES[kind])}}} \\"
            lines += [r"\midrule", title]
            lines += [" & ".join(_latex_cells(table, row)) + r" \\" for row in rows]
    lines += [r"\bottomrule", r"\end{tabular}}", r"\par\smallskip\raggedright\footnotesize"]
    remarks = table.all_remarks if table.shows_differences else table.remarks
    legend = [escape_latex(remark) for remark in remarks]
    legend += [rf"[{number}] {escape_latex(text)}" for number, text in table.citations]
    legend += [rf"\textsuperscript{{{letter}}}\,{escape_latex(text)}" for letter, text in table.notes]
    return "\n".join([*lines, "\\par\n".join(legend), r"\end{table}"])


def _latex_groups(table: Table) -> list[str]:
    """Return the line of group titles with a rule below each, nothing if no group has a title."""
    if not any(group.title for group in table.groups):
        return []
    titles, rules, first = [], [], 3
    for group in table.groups:
        last = first + len(group.heads) - 1
        titles.append(rf"\multicolumn{{{len(group.heads)}}}{{c}}{{{escape_latex(group.title)}}}")
        rules.append(rf"\cmidrule(lr){{{first}-{last}}}")
        first = last + 1
    return [f" & & {' & '.join(titles)} & \\\\", " ".join(rules)]


def _latex_cells(table: Table, row: Row) -> list[str]:
    runs = cells.runs(row, table.groups)
    name = escape_latex(row.name) + (f" ({runs})" if runs else "")
    # A minus sign, not a hyphen, before a difference.
    numbers = [escape_latex(text).replace("(-", "($-$") for text in _numbers(table, row)]
    if row.kind == "ours":
        name = rf"\textbf{{{name}}}"
        numbers = [text if text == cells.NOTHING else rf"\textbf{{{text}}}" for text in numbers]
    else:
        name = f"{{{name}}}"  # after a line end LaTeX would take "[" or "*" for an argument
    cited = f"[{','.join(str(citation) for citation in row.citations)}]" if row.citations else ""
    noted = rf"\textsuperscript{{{','.join(row.notes)}}}" if row.notes else ""
    return [name, cells.epochs(row), *numbers, f"{{{cited}}}{noted}" if cited or noted else ""]
