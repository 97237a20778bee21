"""What the command line makes of files: tables as they stand, or an error with the row and what to do."""

import gzip
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import fit_of, table

from mixjax.cli import main, reading

FORMULA = "Reaction ~ Days + (Days | Subject)"


def frame_of(path, content, as_text=(), **options):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return reading.read(str(path), lambda columns: as_text, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("y,x,g\n1,2,a,\n3,4,b,\n", "row 2 has 4 cells, the header names 3: remove the comma at its end"),
        ("y,x,g\n1,2,a\n1,5,2,a\n", "row 3 has 4 cells, the header names 3: put quotes around .* decimal commas"),
        ("y,x,g\n1,1,2,a\n2,1,5,b\n", "row 2 has 4 cells.* name all columns in the header"),  # names of rows by R
        ("y,x,g\n1,2,a\n\n1,2\n", "row 4 has 2 cells, the header names 3: add what is missing"),
        ("y,x,g\n1,2,a\n7\n", "row 3 has 1 cell, the header"),
        ('y,x,g\n1,2,"a\n1,2,b"\n1,2,3,4\n', "row 4 has 4 cells"),
        ('y,x,g\n1,"2,a\n1,3",b\n1,4,"c,d\n5,6,e"\n9,9\n', "row 6 has 2 cells"),
        ('y,x,g\n1,"2\n3",a,b\n', r"row 2 has 4 cells, the header names 3 \(a quote makes one row of lines 2 to 3"),
        ('y,x,g\n1,2,a\n1,2,"b\n1,3,c\n', "a quote is opened in row 3 and never closed"),
        ('y,x,g\n1,2,"' + "b,c,d\n" * 30_000, "a quote is opened in row 2 and never closed"),  # csv has a limit
        ('y,x,g\n1,2,"a"b\n', "row 2 has text behind a closing quote"),
        ("y,x,g,x\n1,2,a,3\n", "columns 2, 4 are all named 'x': give each a name"),
        ("y,,g\n1,2,a\n", "column 2 has no name in the header: give it one, or remove the column"),
        ("y,x,g,\n1,2,a,\n", "column 4 has no name in the header: .* remove the comma at the end of all rows"),
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("y,x,g\n", r"has a header \(y, x, g\) and no rows"),
        ("y,x,g\n\n\n", "and no rows"),
        (b"y,x,g\n1,2,a\n1,\x00,b\n", "row 3 holds a NUL character"),
        ("y,x,g\n1,2,a\n1,3,é\n".encode("latin-1"), r"row 3 is not utf-8 text \(byte 0xe9\): add --encoding"),
        (b"x" * 20_000 + b"\n" + b"1\n" * 20_000 + b"\xff\n", "row 20002 is not utf-8"),
        ("y,x,g\n1,2,a\n".encode("utf-16"), "seems to be UTF-16 text: add --encoding utf-16"),
        (b"PK\x03\x04\x00", "is a spreadsheet or a zip archive: save the sheet as csv"),
        (b"PAR1\x00", "let its name end in .parquet"),
        (gzip.compress(b"y,x,g\n1,2,a\n", mtime=0), "let its name end in .csv.gz"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused_with_the_row(content, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        frame_of(tmp_path / "data.csv", content)
    assert str(caught.value).startswith(str(tmp_path / "data.csv"))
    assert "\n" not in str(caught.value)


def test_rows_have_the_numbers_that_an_editor_shows(tmp_path):
    content = '\ufeff\ny,x,g\r\n1,2,a\r\n   \r\n\r\n2,3,"b\r\nc"\r\n3,,d\r\n'
    frame = frame_of(tmp_path / "data.csv", content)
    assert frame.index.tolist() == [3, 6, 8]
    assert frame["g"].tolist() == ["a", "b\r\nc", "d"]
    assert frame["x"].isna().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("row", "formula", "message"),
    [
        ("2,inf,b", "y ~ x + (1 | g)", "column 'x' has 1 infinite values (first in row 6)"),
        ("text,2,b", "y ~ x + (1 | g)", "(first: row 6: 'text'), all others are numbers: mend the file"),
        ("2,0,b", "y ~ log(x) + (1 | g)", "(first: row 6)"),
    ],
)
def test_messages_of_the_library_count_rows_as_the_file_does(row, formula, message, tmp_path, capsys):
    path = tmp_path / "data.csv"
    path.write_text(f"y,x,g\n1,2,a\n2,3,b\n4,3,a\n\n{row}\n")
    assert main(["fit", formula, str(path), "--no-cache"]) == 2
    assert message in capsys.readouterr().err


def test_missing_cells_are_those_that_the_help_names_and_no_names_of_levels(tmp_path, capsys):
    content = "y,arm\n1,None\n2,null\nNA,n/a\nNaN,NA\nnan,\n,None\n"
    frame = frame_of(tmp_path / "data.csv", content)
    assert frame["y"].isna().tolist() == [False, False, True, True, True, True]
    assert frame["arm"].dropna().tolist() == ["None", "null", "n/a", "None"]
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    assert "empty, NA, NaN or nan are missing" in " ".join(capsys.readouterr().out.split())


def test_names_are_those_of_the_file(tmp_path):
    content = "id,1,flag,dose,g\n007,1.5,TRUE,1,10\n7,2.5,FALSE,2,9\n10,3,NA,10,9\n7.0,4,TRUE,2,x\n"
    frame = frame_of(tmp_path / "data.csv", content, as_text=("id", "dose", "g", "nowhere"))
    assert frame.columns.tolist() == ["id", "1", "flag", "dose", "g"]
    assert frame["id"].tolist() == ["007", "7", "10", "7.0"]
    assert frame["dose"].cat.categories.tolist() == ["1", "2", "10"]  # by number
    assert frame["g"].cat.categories.tolist() == ["10", "9", "x"]
    assert frame["flag"].dropna().tolist() == ["TRUE", "FALSE", "TRUE"]
    assert frame["1"].dtype == float


def test_a_column_has_one_type_however_long_the_file(tmp_path):
    content = "x\n" + "1\n" * 300_000 + "a\n"  # pandas reads it in pieces
    assert set(frame_of(tmp_path / "data.csv", content)["x"]) == {"1", "a"}


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-8-sig", "utf-16-le"])
def test_encodings(encoding, tmp_path):
    content = "größe;y\n1,5;é\n".encode(encoding)
    frame = frame_of(tmp_path / "data.csv", content, separator=";", decimal=",", encoding=encoding)
    assert frame.to_dict("list") == {"größe": [1.5], "y": ["é"]}


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    assert frame_of(tmp_path / "data.csv", '\ufeff"a b",c\n1,2\n').columns.tolist() == ["a b", "c"]


def test_names_of_rows_without_a_name_of_their_own_are_left_out(tmp_path):
    written = io.StringIO()
    pd.DataFrame({"y": [1, 2]}, index=["first", "second"]).to_csv(written)
    frame = frame_of(tmp_path / "data.csv", written.getvalue())
    assert frame.columns.tolist() == ["y"]
    assert frame.index.tolist() == [2, 3]


def test_compressed_files_and_broken_ones(tmp_path):
    packed = gzip.compress(b"y,x\n1,2\n", mtime=0)
    assert frame_of(tmp_path / "data.csv.gz", packed)["x"].tolist() == [2]
    with pytest.raises(ValueError, match="cannot be read"):
        frame_of(tmp_path / "data.csv.gz", packed[:-4])


@pytest.mark.parametrize("name", ["cake", "data.parquet"])
def test_options_of_csv_files_are_for_csv_files_only(name, tmp_path, capsys):
    table("sleepstudy").to_parquet(tmp_path / "data.parquet")
    name = str(tmp_path / name) if "." in name else name
    assert main(["fit", FORMULA, name, "--sep", ";", "--decimal", ","]) == 2
    assert f"--sep, --decimal: only for csv files; {name} is none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decimal", ","], "--sep and --decimal are both ','"),
        (["--sep", ";;"], "';;' is not one character"),
        (["--encoding", "klingon"], "there is no encoding 'klingon'; try utf-8"),
        (["--encoding", "base64"], "there is no encoding 'base64'"),
        (["--ref", "arm"], "'arm' is not COLUMN=LEVEL"),
    ],
)
def test_options_that_cannot_be(options, message, tmp_path, capsys):
    (tmp_path / "data.csv").write_text("y,x,g\n1,2,a\n")
    assert status_of(["fit", "y ~ x + (1 | g)", str(tmp_path / "data.csv"), *options]) == 2
    assert message in capsys.readouterr().err


def status_of(arguments):
    """argparse leaves by an exception of its own."""
    try:
        return main(arguments)
    except SystemExit as left:
        return left.code


def test_folders_and_forbidden_files(tmp_path, capsys, monkeypatch):
    assert main(["fit", FORMULA, str(tmp_path)]) == 2
    assert "is a folder: name a file in it" in capsys.readouterr().err
    (tmp_path / "data.csv").write_text("y,x\n1,2\n")

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "data.csv"))

    monkeypatch.setattr(reading, "_bytes", forbidden)
    assert main(["fit", FORMULA, str(tmp_path / "data.csv")]) == 2
    assert capsys.readouterr().err == f"mixjax: {tmp_path / 'data.csv'}: Permission denied\n"


def test_decimal_commas_point_to_the_option_that_reads_them(tmp_path, capsys):
    path = str(tmp_path / "data.csv")
    table("sleepstudy").to_csv(path, index=False, sep=";", decimal=",")
    assert main(["fit", FORMULA, path, "--sep", ";", "--no-cache"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"\(first: row 2: '249,56'\): add --decimal ','", said)
    assert "pandas" not in said
    assert main(["fit", FORMULA, path, "--sep", ";", "--decimal", ",", "--no-cache"]) == 0
    assert "1743.6" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/dev/stdin"), reason="this system has no such name for its standard input")
def test_a_pipe_is_read_once(tmp_path):
    command = [sys.executable, "-m", "mixjax", "fit", FORMULA, "/dev/stdin", "--no-cache"]
    text = table("sleepstudy").to_csv(index=False)
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    assert done.stdout.strip() == str(fit_of("sleepstudy_slopes", "REML").summary())


# --- reference levels ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """Responses of 40 people under a placebo and two doses, which are numbers in the file."""
    rng = np.random.default_rng(1)
    g = np.repeat(np.arange(40), 6)
    arm = np.array(["drug", "none", "placebo"])[g % 3]
    dose = np.array([0.5, 5, 10])[np.arange(len(g)) % 3]
    y = rng.normal(size=len(g)) + rng.normal(size=40)[g] + (arm == "drug") + dose / 10
    path = tmp_path_factory.mktemp("trial") / "trial.csv"
    pd.DataFrame({"y": y, "arm": arm, "dose": dose, "g": g}).to_csv(path, index=False)
    return str(path)


def fixed(arguments, capsys):
    assert main([*arguments, "--json", "--no-cache"]) == 0
    return json.loads(capsys.readouterr().out)["fixef"]


def test_reference_levels(trial, capsys):
    formula = "y ~ arm + dose + (1 | g)"
    plain = fixed(["fit", "y ~ arm + C(dose) + (1 | g)", trial], capsys)
    chosen = fixed(["fit", formula, trial, "--ref", "arm=placebo", "--ref", "dose=10.0"], capsys)
    assert list(plain) == ["Intercept", "arm[T.none]", "arm[T.placebo]", "C(dose)[T.5.0]", "C(dose)[T.10.0]"]
    assert list(chosen) == ["Intercept", "arm[T.drug]", "arm[T.none]", "dose[T.0.5]", "dose[T.5.0]"]
    assert chosen["arm[T.drug]"] == pytest.approx(-plain["arm[T.placebo]"], rel=1e-6)
    assert chosen["dose[T.0.5]"] == pytest.approx(-plain["C(dose)[T.10.0]"], rel=1e-6)


def test_reference_levels_of_a_bundled_data_set(capsys):
    names = fixed(["fit", "angle ~ recipe + (1 | replicate)", "cake", "--ref", "recipe=B"], capsys)
    assert list(names) == ["Intercept", "recipe[T.A]", "recipe[T.C]"]


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (["arm=Placebo"], "--ref arm=Placebo: there is no such level; there are drug, none, placebo"),
        (["armm=drug"], "no column 'armm' (--ref); did you mean 'arm'?"),
        (["g=3"], "--ref names 'g', of which the formula makes no effect"),
        (["arm=drug", "arm=none"], "--ref names 'arm' more than once"),
    ],
)
def test_reference_levels_that_cannot_be(references, message, trial, capsys):
    options = [part for text in references for part in ("--ref", text)]
    assert main(["fit", "y ~ arm + (1 | g)", trial, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_reference_level_without_complete_rows_is_refused(trial, tmp_path, capsys):
    frame = pd.read_csv(trial)
    frame.loc[frame["arm"] == "placebo", "y"] = None
    frame.to_csv(tmp_path / "data.csv", index=False)
    path = str(tmp_path / "data.csv")
    assert main(["fit", "y ~ arm + (1 | g)", path, "--ref", "arm=placebo", "--no-cache"]) == 2
    assert "--ref arm=placebo: all rows of this level miss some value" in capsys.readouterr().err


def test_levels_that_look_like_numbers_stay_apart(tmp_path, capsys):
    frame = table("sleepstudy").assign(
        Subject=lambda d: [f"{'0' * (int(s) % 2)}{int(s) // 2}" for s in d["Subject"].astype(str)]
    )
    frame.to_csv(tmp_path / "data.csv", index=False)
    assert frame["Subject"].nunique() > frame["Subject"].astype(int).nunique()
    assert main(["fit", FORMULA, str(tmp_path / "data.csv"), "--json", "--no-cache"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == {"Subject": frame["Subject"].nunique()}
