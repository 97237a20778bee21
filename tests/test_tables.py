"""Tables as text, HTML, LaTeX and Markdown: what stands in the cells, and that nothing in a cell breaks the table."""

import html
import io
import json
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from conftest import HERE, fit_of, table
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mixjax as mj
from mixjax import numerals
from mixjax.markup import Cells, Report, Reported, latex_escaped, markdown_escaped
from mixjax.tables import NotedTable, frame_cells, text_table

NAN, INF = float("nan"), float("inf")


# --- reading the formats back ---------------------------------------------------------------------------------------

LATEX = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<",
    r"\textgreater{}": ">", r"\textbar{}": "|", r"\textasciigrave{}": "`", r"\{": "{", r"\}": "}", r"\$": "$",
    r"\&": "&", r"\#": "#", r"\_": "_", r"\%": "%", "$-$": "-", "-{}-": "--",
}  # fmt: skip
_TOKEN = re.compile("|".join(map(re.escape, sorted(LATEX, key=len, reverse=True))) + r"|\{([\[*])\}|(.)", re.DOTALL)


def from_latex(text):
    """Signs of escaped text; nothing else of LaTeX may be in it."""
    read = []
    for token in _TOKEN.finditer(text):
        assert token[2] is None or token[2] not in "\\{}$&#_%~^", text
        read.append(token[1] or token[2] or LATEX[token[0]])
    return "".join(read)


def rows_of_latex(text):
    """Rows of cells of one tabular: split at ampersands that are none of the text."""
    assert text.startswith(r"\noindent\begin{tabular}{")
    assert text.endswith("\\bottomrule\n\\end{tabular}")
    lines = [line for line in text.split("\n")[2:-2] if line != r"\midrule"]
    assert all(line.endswith(r" \\") for line in lines)
    return [[from_latex(cell) for cell in re.split(r"(?<!\\) ?& ?", line[:-3])] for line in lines]


def rows_of_markdown(text):
    lines = text.split("\n")
    found = []
    for line in lines[:1] + lines[2:]:
        assert line.startswith("| ")
        assert line.endswith(" |")
        cells = re.split(r"(?<!\\)((?:\\\\)*) \| ", line[2:-2])
        cells = [a + b for a, b in zip(cells[::2], [*cells[1::2], ""], strict=True)]
        found.append([re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell) for cell in cells])
        bars = re.findall(r"(?<!\\)(?:\\\\)*\|", line)
        assert len(bars) == len(cells) + 1, line
    return found


class _Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.rows, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def rows_of_html(text):
    parser = _Cells()
    parser.feed(text)
    parser.close()
    assert not parser.open
    return parser.rows


READERS = {"latex": rows_of_latex, "markdown": rows_of_markdown, "html": rows_of_html}


# --- formats --------------------------------------------------------------------------------------------------------

SMALL = Cells(["", "Estimate"], [["a_1", "-1.5"], ["", "(0.2)"], ["b", "1e-07"]], title="Fixed", rules=(2,))
REPORT = Report(["A title", SMALL], ["5 % of it"])


def test_text():
    assert REPORT.text() == (
        "A title\nFixed:\n    Estimate\na_1     -1.5\n       (0.2)\n------------\nb      1e-07\n5 % of it"
    )


def test_latex():
    assert REPORT.latex() == "\n".join(
        [
            r"\noindent A title",
            "",
            r"\smallskip\noindent\textbf{Fixed}",
            "",
            r"\noindent\begin{tabular}{lr}",
            r"\toprule",
            r" & Estimate \\",
            r"\midrule",
            r"a\_1 & $-$1.5 \\",
            r" & (0.2) \\",
            r"\midrule",
            r"b & $1 \times 10^{-7}$ \\",
            r"\bottomrule",
            r"\end{tabular}",
            "",
            r"{\smallskip\footnotesize\noindent 5 \% of it\par}",
        ]
    )
    placed = REPORT.latex("Effects of $x$", "tab:x")
    assert placed.startswith(
        "\\begin{table}\n\\centering\n\\caption{Effects of $x$}\n\\label{tab:x}\n\\smallskip\n\\noindent A"
    )
    assert placed.endswith("\\par}\n\\end{table}")


def test_html():
    left, right = ' style="text-align: left"', ' style="text-align: right"'
    assert REPORT.html() == "\n".join(
        [
            "<p>A title</p>",
            "<h4>Fixed</h4>",
            '<table style="border-collapse: collapse">',
            f'<thead><tr style="border-bottom: 1px solid"><th{left}></th><th{right}>Estimate</th></tr></thead>',
            "<tbody>",
            f"<tr><td{left}>a_1</td><td{right}>-1.5</td></tr>",
            f"<tr><td{left}></td><td{right}>(0.2)</td></tr>",
            f'<tr style="border-top: 1px solid"><td{left}>b</td><td{right}>1e-07</td></tr>',
            "</tbody>",
            "</table>",
            "<p>5 % of it</p>",
        ]
    )


def test_markdown():
    assert REPORT.markdown() == (
        "A title\n\n**Fixed**\n\n|  | Estimate |\n| :--- | ---: |\n| a_1 | -1.5 |\n|  | (0.2) |\n| b | 1e-07 |\n\n"
        "5 % of it"
    )


@pytest.mark.parametrize(
    ("text", "latex", "markdown"),
    [
        ("a_b", r"a\_b", "a_b"),
        ("_b_", r"\_b\_", r"\_b\_"),
        ("50 %", r"50 \%", "50 %"),
        ("a & b", r"a \& b", r"a \& b"),
        ("#1", r"\#1", "#1"),
        ("$x$", r"\$x\$", r"\$x\$"),
        ("{x}", r"\{x\}", "{x}"),
        ("~ ^", r"\textasciitilde{} \textasciicircum{}", r"\~ ^"),
        ("\\", r"\textbackslash{}", r"\\"),
        ("x|g", r"x\textbar{}g", r"x\|g"),
        ("<b>", r"\textless{}b\textgreater{}", r"\<b>"),
        ("`a b`", r"\textasciigrave{}a b\textasciigrave{}", r"\`a b\`"),
        ("a * b", "a * b", r"a \* b"),
        ("[1, 2]", "{[}1, 2]", "[1, 2]"),
        ("*x", "{*}x", r"\*x"),
        ("[a](b)", "{[}a](b)", r"[a]\(b)"),
        ("[-1.5, -inf]", "{[}$-$1.5, $-$inf]", "[-1.5, -inf]"),
        ("A - B", "A - B", "A - B"),
        ("2020-01-02", "2020-01-02", "2020-01-02"),
        ("a--b", "a-{}-b", "a--b"),
        ("-2.5e+10", r"$-2.5 \times 10^{10}$", "-2.5e+10"),
        ("höhe σ²", "höhe σ²", "höhe σ²"),
        ("a\r\nb", "a b", "a b"),
    ],
)
def test_signs_that_mean_something(text, latex, markdown):
    assert latex_escaped(text) == latex
    assert markdown_escaped(text) == markdown
    # In the first column a bracket or star would belong to the end of the row before.
    assert "\n\\[" not in Report([Cells(["a"], [[text], [text]])]).latex()


@pytest.mark.parametrize("line", ["# a", "> a", "- a", "+ a", "1. a", "12) a", "=== a", "\x1b# a"])
def test_a_line_is_no_block_of_markdown(line):
    text = Report([line]).markdown()
    line = line.lstrip("\x1b")
    assert text == re.sub(r"^(\d*)(.)", r"\1\\\2", line)
    assert text != line


names = st.text(
    st.one_of(st.sampled_from("\\{}$&#_%~^|<>`*[]()-\"'\n\t ="), st.characters(exclude_categories=["Cs"])), max_size=8
)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 4).flatmap(lambda k: st.lists(st.lists(names, min_size=k, max_size=k), min_size=1, max_size=4)))
def test_no_cell_breaks_a_table(cells):
    """Every format is read back: as many cells in each row, and in each its text."""
    report = Report([Cells(cells[0], cells[1:])])
    shown = [[re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", cell).strip() for cell in row] for row in cells]
    exponent = re.compile(r"(-?[\d.]+)e([+-]\d+)")
    for name, read in READERS.items():
        if name == "latex" and any(exponent.fullmatch(cell) for row in shown for cell in row):
            continue
        found = [[cell.strip() for cell in row] for row in read(getattr(report, name)())]
        assert found == shown, name
    assert len(report.text().split("\n")) == len(cells)


def test_columns_stand_below_each_other_in_any_script():
    """East Asian signs take two columns, an accent of its own none."""
    lines = text_table(pd.DataFrame({"": ["身長", "e\u0301", "x"], "n": ["1", "2", "3"]}), left=1).split("\n")
    assert lines == ["     n", "身長 1", "e\u0301    2", "x    3"]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX at hand")
def test_latex_is_taken_by_latex(tmp_path):
    """Every sign in every place, a table of fits, and a caption."""
    signs = "\\{}$&#_%~^|<>`*[]()-\"'=é"
    cells = Cells(
        [f"{s}a{s}" for s in signs], [[s * 2 for s in signs], list(signs), ["[1]", *["-1e-05"] * (len(signs) - 1)]]
    )
    models = mj.table(fit_of("sleepstudy_slopes", "REML"), "ci", stars=True)
    parts = [Report([signs, cells], [signs]).latex(), models.to_latex(caption="One", label="t")]
    parts += [fit_of("cake_temp", "REML").summary("wald").to_latex(caption="Two")]
    page = "\n\n".join(
        [r"\documentclass{article}\usepackage{booktabs}\begin{document}", "{\\tiny", *parts, "}", r"\end{document}"]
    )
    (tmp_path / "page.tex").write_text(page, encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "page.tex"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "page.pdf").exists()


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "decimals", "text"),
    [
        (1.005, 1, "1.0"), (-0.04, 1, "0.0"), (-0.0, 2, "0.00"), (-0.06, 1, "-0.1"), (NAN, 2, "NaN"), (INF, 1, "inf"),
        (-INF, 1, "-inf"), (1e300, 2, "1e+300"), (-1e15, 0, "-1e+15"), (999_999.5, 1, "999999.5"), (0.0, 0, "0"),
        (-0.4, 0, "0"),
    ],
)  # fmt: skip
def test_number(x, decimals, text):
    assert numerals.number(x, decimals) == text


@pytest.mark.parametrize(
    ("p", "digits", "text"),
    [
        (0.0, 3, "<0.001"), (0.000999, 3, "<0.001"), (0.001, 3, "0.001"), (0.0499999, 3, "0.050"), (1.0, 3, "1.000"),
        (0.004, 2, "<0.01"), (0.04, 1, "<0.1"), (NAN, 3, "NaN"), (1e-320, 5, "<0.00001"),
    ],
)  # fmt: skip
def test_p_value(p, digits, text):
    assert numerals.p_value(p, digits) == text


@pytest.mark.parametrize(
    ("values", "digits", "by", "texts"),
    [
        ([251.405, 10.467], 3, [6.825, 1.546], ["251.41", "10.47"]),
        ([251.405, 0.002], 3, [6.825, 1.546], ["251.41", "0.00"]),  # next to its standard error a zero
        ([24.74, 5.922, 1e-9, 0.0], 3, (), ["24.74", "5.92", "1.00e-09", "0.00"]),
        ([-1e-9, 1.0], 2, (), ["-1.0e-09", "1.0"]),
        ([125000.0, -0.1249], 3, (), ["125000", "-1.25e-01"]),  # a digit of its own would be all that is left
        ([9.996, 99.96], 3, (), ["10.0", "100.0"]),
        ([1.5e-12, 2.5e-12], 3, (), ["1.5e-12", "2.5e-12"]),
        ([3.2e12, -1.0], 3, (), ["3.2e+12", "-1"]),
        ([NAN, INF, -INF, 1.234], 3, (), ["NaN", "inf", "-inf", "1.23"]),
        ([NAN, 0.0], 3, (), ["NaN", "0.00"]),
        ([1e10, NAN, -0.0], 2, (), ["1e+10", "NaN", "0"]),
        ([123456.0], 3, (), ["123456"]),
        ([], 3, (), []),
    ],
)
def test_column(values, digits, by, texts):
    assert numerals.column(values, digits, by) == texts


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(1e-6, 1e6) | st.floats(-1e6, -1e-6) | st.just(0.0), min_size=1, max_size=6), st.integers(1, 8)
)
@example([0.5078125, 8.568167686462402e-06], 4)
def test_rounding_keeps_the_digits_that_were_asked_for(values, digits):
    """Half a unit of the last digit of the smallest number that counts, or, with an exponent, of each."""
    sizes = [abs(x) for x in values if x]
    texts = numerals.column(values, digits)
    exponents = numerals.common_decimals(values, digits) > numerals.MOST_DECIMALS
    for x, text in zip(values, texts, strict=True):
        least = np.inf if exponents else min((size for size in sizes if size >= 1e-6 * max(sizes)), default=1.0)
        assert abs(float(text) - x) <= 0.5000001 * 10.0 ** (np.floor(np.log10(min(least, abs(x) or 1.0))) + 2 - digits)
        assert (float(text) == 0) == (x == 0)
        assert not re.fullmatch(r"-0\.?0*", text)


# --- data frames with notes -----------------------------------------------------------------------------------------


@pytest.fixture
def noted():
    frame = pd.DataFrame(
        {"estimate": [1.23456, -0.0004], "std_error": [0.1, NAN], "df": [12.345, INF], "p_value": [2e-5, 0.5]},
        index=["a_1", "b|c"],
    )
    return NotedTable(frame, ["type III & others"])


def test_columns_have_the_names_of_papers(noted):
    assert noted.to_markdown() == (
        "|  | Estimate | Std. Error | df | p |\n| :--- | ---: | ---: | ---: | ---: |\n"
        "| a_1 | 1.235 | 0.100 | 12.35 | \\<0.001 |\n| b\\|c | 0.000 |  | inf | 0.500 |\n\ntype III \\& others"
    )
    assert noted.to_latex().endswith("\\end{tabular}\n\n{\\smallskip\\footnotesize\\noindent type III \\& others\\par}")
    assert noted.to_html().endswith("</table>\n<p>type III &amp; others</p>")
    # The table itself keeps its names and all digits.
    assert repr(noted).splitlines()[-1] == "type III & others"
    assert "std_error" in repr(noted)
    assert "<th>std_error</th>" in noted._repr_html_()


def test_arguments(noted):
    text = noted.to_markdown(digits=2, columns=["p_value", "estimate"], header=["p", "b"], index=False, na_rep="-")
    assert text.split("\n")[:4] == ["| p | b |", "| ---: | ---: |", "| \\<0.01 | 1.23 |", "| 0.50 | 0.00 |"]
    assert "| - |" in noted.to_markdown(na_rep="-")
    assert noted.to_latex(caption="C", label="l").startswith("\\begin{table}\n\\centering\n\\caption{C}\n\\label{l}")
    counted = NotedTable(pd.DataFrame({"recipe": ["A"], "estimate": [1.0]}), [])
    assert counted.to_markdown().split("\n")[0] == "| recipe | Estimate |"
    assert counted.to_markdown(index=True).split("\n")[0] == "|  | recipe | Estimate |"


def test_what_is_wrong_is_named(noted):
    with pytest.raises(ValueError, match="no column 'std_err'; there are 'estimate', 'std_error'"):
        noted.to_html(columns=["std_err"])
    with pytest.raises(ValueError, match="header= names 1 columns, but there are 4"):
        noted.to_latex(header=["x"])
    with pytest.raises(ValueError, match="digits must be an integer, 1 or more, got 0"):
        noted.to_markdown(digits=0)
    with pytest.raises(ValueError, match="digits must be 12 or less"):
        noted.to_markdown(digits=40)
    with pytest.raises(ValueError, match="digits= rounds the table that is written here, and border belongs to"):
        noted.to_html(digits=3, border=0)


def test_files(noted, tmp_path):
    for method in ("to_latex", "to_html", "to_markdown"):
        write = getattr(noted, method)
        path, stream = tmp_path / method, io.StringIO()
        assert write(path) is None
        assert write(stream) is None
        assert path.read_text(encoding="utf-8") == stream.getvalue() == write() + "\n"
        summary = fit_of("sleepstudy_slopes", "REML").summary()
        assert getattr(summary, method)(path) is None
        assert path.read_text(encoding="utf-8") == getattr(summary, method)() + "\n"


def test_arguments_of_pandas_still_work(noted):
    """What only pandas knows is done by pandas, on the numbers; the notes stay."""
    page = noted.to_html(border=0, classes="mine")
    assert 'class="dataframe mine"' in page
    assert "std_error" in page
    assert page.endswith("<p>type III &amp; others</p>")
    assert "estimate" not in noted.to_html(header=False)
    pytest.importorskip("jinja2")
    tex = noted.to_latex(float_format="%.1f", caption="C")
    assert "1.2" in tex
    assert tex.count("C}") == 1
    assert tex.endswith("type III \\& others\\par}")
    pytest.importorskip("tabulate")
    assert noted.to_markdown(tablefmt="grid").startswith("+--")


def test_neither_jinja2_nor_tabulate_is_needed(noted, monkeypatch):
    for name in ("jinja2", "tabulate"):
        monkeypatch.setitem(sys.modules, name, None)
    for method in ("to_latex", "to_html", "to_markdown"):
        monkeypatch.setattr(pd.DataFrame, method, None)
        assert getattr(noted, method)()


def test_names_of_rows_are_not_rounded():
    """A covariate at 11.25 is no estimate; nor is a factor that is called like a column of numbers."""
    frame = pd.DataFrame({"temp": [11.25, 175.0], "p_value": [0.1 + 0.2, 1e-9], "estimate": [1.0, 2.0]})
    cells = frame_cells(frame, digits=1)
    assert cells.heads == ["temp", "p_value", "Estimate"]
    assert cells.rows == [["11.25", "0.3", "1"], ["175", "1e-09", "2"]]
    assert cells.left == 2


def test_decimals_follow_standard_errors_or_intervals():
    limits = frame_cells(pd.DataFrame({"lower": [26.0067, 8.8865], "upper": [52.9360, 11.9520]}))
    assert limits.rows == [["26.007", "52.936"], ["8.886", "11.952"]]  # quarters of 26.9 and 3.07
    errors = frame_cells(pd.DataFrame({"estimate": [2.5, 3.0], "std_error": [1.25, 1e-9]}))
    assert errors.rows == [["2.50", "1.25"], ["3.00", "1.00e-09"]]
    users = frame_cells(pd.DataFrame({"df": [0.00123], "estimate": [1.23456]}), known=False)
    assert (users.heads, users.rows) == (["df", "estimate"], [["0.00123", "1.23"]])


@pytest.mark.parametrize(
    ("columns", "head"),
    [({"df": [3.0]}, "t"), ({"df": [INF]}, "z"), ({"num_df": [1], "den_df": [3.0]}, "F"), ({}, "Statistic")],
)
def test_the_statistic_is_called_by_its_test(columns, head):
    assert frame_cells(pd.DataFrame({"statistic": [1.0], **columns})).heads[0] == head


def test_tests_of_a_fit_against_r():
    reference = json.loads((HERE / "oracle" / "inference_ddf_sleepstudy_slopes.json").read_text())["satterthwaite"]
    expected = reference["anova_typeIII"]
    row = fit_of("sleepstudy_slopes", "REML").anova().to_markdown(digits=4).split("\n")[2]
    shown = [expected[name][0] for name in ("Sum Sq", "Mean Sq", "NumDF", "DenDF", "F value")]
    texts = [f"{x:.{k}f}" for x, k in zip(shown, (0, 0, 0, 3, 3), strict=True)]
    assert row == f"| Days | {' | '.join(texts)} | \\<0.0001 |"


# --- summaries ------------------------------------------------------------------------------------------------------


def test_summary_has_everything_in_every_format():
    fit = fit_of("sleepstudy_slopes", "ML")
    summary = fit.summary("satterthwaite")
    plain = {
        "latex": summary.to_latex().replace(r"\textasciitilde{}", "~").replace(r"\textbar{}", "|").replace("$-$", "-"),
        "html": html.unescape(summary.to_html()),
        "markdown": summary.to_markdown().replace("\\", ""),
    }
    for text in plain.values():
        for part in (
            "Linear mixed model fit by maximum likelihood",
            "Formula: Reaction ~ Days + (Days | Subject)",
            "AIC 1763.9, BIC 1783.1, logLik -876.0, -2*log(L) 1751.9, df.resid 174",
            "Random effects", "Fixed effects", "Number of obs: 180, groups: Subject, 18", "Std.Dev.", "Pr(>|t|)",
            "satterthwaite degrees of freedom",
        ):  # fmt: skip
            assert part in text.replace(r"\textgreater{}", ">"), (part, text)
    cells = rows_of_html(summary.to_html())
    days = next(row for row in cells if row[0] == "Days")
    frame = fit.summary("satterthwaite").tests.loc["Days"]
    assert days == ["Days", *(f"{frame[n]:.{k}f}" for n, k in
                              (("estimate", 3), ("std_error", 3), ("df", 2), ("statistic", 3))), "<0.001"]  # fmt: skip
    assert plain["html"].count("<table") == 2


def test_summary_says_what_is_special():
    data = table("sleepstudy").assign(twice=lambda d: 2 * d["Days"])
    with pytest.warns(mj.DataWarning):
        text = mj.lmm("Reaction ~ Days + twice + (1 | Subject)", data).summary().to_markdown()
    assert text.endswith("redundant fixed-effects columns left out: twice")
    assert "singular fit" in fit_of("dyestuff2", "REML").summary().to_latex()
    none = mj.lmm("Reaction ~ 0 + (1 | Subject)", data).summary("wald")
    for text in (none.to_markdown(), none.to_latex(), none.to_html()):
        assert "Fixed effects: none" in text
        assert "wald" not in text


def test_varcorr():
    assert fit_of("sleepstudy_slopes", "REML").varcorr.to_markdown().split("\n")[2:] == [
        "| Subject | Intercept | 612.09 | 24.740 |  |",
        "|  | Days | 35.07 | 5.922 | 0.07 |",
        "| Residual |  | 654.94 | 25.592 |  |",
    ]


# --- every result in a notebook -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda fit: mj.compare(fit, fit_of("sleepstudy_intercept", "REML")), ["Chisq", "42.1393"]),
        (lambda fit: mj.exact_rlrt(fit_of("sleepstudy_intercept", "REML"), n=100), ["statistic = 107.2"]),
        (lambda fit: fit.profile("sigma"), ["95 % profile likelihood intervals", "Lower"]),
        (lambda fit: fit_of("cake_temp", "REML").emmeans("recipe"), ["marginal means of recipe", "Estimate", "33.12"]),
        (lambda fit: fit.robust(), ["CR2", "Days"]),
        (lambda fit: fit.bootstrap(1, 8), ["Parametric bootstrap", "sd_Days|Subject"]),
        (lambda fit: fit.influence("Subject", method="fixed-theta"), ["Cook&#x27;s distance", "Far out"]),
        (lambda fit: fit.quantile_residuals(1, n=20), ["uniformity", "Expected"]),
        (lambda fit: fit.refit_many(fit.simulate(1, 12)), ["BatchFit of 12", "and 2 more, see to_frame()"]),
        (lambda fit: fit.varcorr, ["Std.Dev.", "24.740"]),
        (lambda fit: fit, ["Random effects", "251.405"]),
        (lambda fit: mj.table(fit), ["251.41", "Observations"]),
    ],
)
def test_results_show_themselves(make, words):
    fit = fit_of("sleepstudy_slopes", "REML")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mj.InferenceWarning)  # a REML fit is refitted by ML for some of them
        result = make(fit)
        page = result._repr_html_()
    for word in words:
        assert word in page, page
    rows = [row for row in rows_of_html(page) if row]
    assert len({len(row) for row in rows}) <= 2
    if isinstance(result, Reported):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", mj.InferenceWarning)
            assert result.to_html() == page
            assert "tabular" in result.to_latex() or "table" not in page
            assert result.to_markdown()


def test_studies_and_samples_show_themselves():
    fit = fit_of("sleepstudy_intercept", "REML")
    model = "Reaction ~ Days + (1 | Subject)"
    power = mj.power(fit, model, "Days", replicates=20, progress=False)
    page = power._repr_html_()
    assert rows_of_html(page)[0][:4] == ["Power", "MC error", "Lower", "Upper"]
    assert rows_of_html(page)[1][0] == f"{power.table['power'][0]:.3f}"
    assert "power of Days at level 0.05" in page
    study = mj.study(fit, model, replicates=20, progress=False)
    rows = rows_of_html(study._repr_html_())
    assert rows[0][:2] == ["Term", "Bias"]
    frame = study.to_frame("bias").set_index("term")["value"]
    assert {row[0]: row[1] for row in rows[1:]} == {term: f"{x:.4g}" for term, x in frame.items()}
    assert "fits failed" in study._repr_html_()
    population = mj.population(x=mj.normal(), y=mj.response("1 + x", error_scale=1.0))
    assert population.sample_x(3, key=1)._repr_html_().count("<tr") == 4


# --- printing ---------------------------------------------------------------------------------------------------------


def test_no_column_is_cut_out_when_a_table_is_printed(monkeypatch):
    cake = fit_of("cake_factor", "REML")
    table = cake.emmeans("recipe | temperature").contrasts()
    for columns in (80, 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        for shown in (table, cake.tidy("kenward-roger"), cake.ranova(), *cake.pca().values(), cake.glance()):
            words = re.split(r"\s+", str(shown))
            assert "..." not in words
            assert set(shown.columns) <= set(words)
    lines = str(table).splitlines()
    assert len(lines) == 1 + len(table) + len(table.attrs["notes"])  # not broken: nobody says how long a line may be
    assert repr(table) == str(table)


def test_a_terminal_breaks_lines_and_loses_no_column(monkeypatch):
    table = fit_of("cake_factor", "REML").emmeans("recipe | temperature").contrasts()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    text = str(table)
    shown = [line for line in text.splitlines() if line not in table.attrs["notes"]]
    assert set(table.columns) <= set(re.split(r"\s+", text))
    assert max(map(len, shown)) <= 80  # pandas' display.width
    assert len(shown) > 2 * len(table)


def test_options_of_pandas_that_a_user_has_set_are_kept():
    table = fit_of("cake_factor", "REML").emmeans("recipe | temperature").contrasts()
    with pd.option_context("display.max_columns", 4):
        shown = repr(pd.DataFrame(table))
        assert str(table).startswith(shown)
        assert "..." in shown
    with pd.option_context("display.max_rows", 4):
        assert "..." in str(table)
    before = pd.get_option("display.width"), pd.get_option("display.max_columns")
    str(table)
    assert (pd.get_option("display.width"), pd.get_option("display.max_columns")) == before
