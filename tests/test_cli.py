"""The command line, as a user's shell runs it."""

import contextlib
import json
import os
import subprocess
import sys

import glmm_cases
import numpy as np
import pandas as pd
import pytest
from conftest import fit_of, table

import mixjax as mj
from mixjax.cli import main

FORMULA = "Reaction ~ Days + (Days | Subject)"


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "mixjax", *arguments], capture_output=True, text=True)


def test_fit_prints_the_summary_and_compiles_nothing(tmp_path):
    done = run("fit", FORMULA, "sleepstudy", "--cache-dir", str(tmp_path / "programs"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(fit_of("sleepstudy_slopes", "REML").summary())
    assert done.stderr == ""
    assert not any((tmp_path / "programs").iterdir())


def test_compiled_programs_are_kept(tmp_path):
    """Of random numbers, here; a fit has none."""
    kept = ["--cache-dir", str(tmp_path / "kept")]
    done = run(*POWER[:-1], "--groups", "8", "--x", "x=between", "--replicates", "5", "--key", "3", *kept)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "kept").iterdir())


def test_json_by_ml_from_a_csv_with_weights(tmp_path, capsys):
    table("sleepstudy_wo").to_csv(tmp_path / "data.csv", index=False)
    code = main(["fit", FORMULA, str(tmp_path / "data.csv"), "--ml", "--weights", "w", "--json", "--no-cache"])
    result = json.loads(capsys.readouterr().out)
    assert code == 0
    reference = fit_of("sleepstudy_weighted", "ML")
    assert result["method"] == "ML"
    assert result["criterion"] == pytest.approx(reference.criterion, abs=1e-9)
    assert result["fixef"]["Days"] == pytest.approx(reference.fixef["Days"], rel=1e-9)
    assert result["varcorr"][-1]["group"] == "Residual"


def test_json_has_null_where_there_is_no_number(capsys):
    assert main(["fit", "Yield ~ 1 + (1 | Batch)", "dyestuff2", "--json", "--no-cache"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["singular"] is True
    assert result["varcorr"][0]["name2"] is None


def test_parquet(tmp_path, capsys):
    table("sleepstudy").to_parquet(tmp_path / "data.parquet")
    assert main(["fit", FORMULA, str(tmp_path / "data.parquet"), "--no-cache"]) == 0
    assert "1743.6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([FORMULA, "nosuchfile.csv"], "there is no file 'nosuchfile.csv'"),
        (["Reaction ~ dayz + (1 | Subject)", "sleepstudy"], "no column 'dayz'"),
        ([FORMULA, "sleepstudy", "--weights", "nope"], "no column 'nope' (weights=)"),
        (["Reaction ~ Days", "sleepstudy"], "no random term"),
        (["Reaction ~ Days + (1 | Subject", "sleepstudy"], "never closed"),
    ],
)
def test_bad_input_is_exit_code_2_and_a_message(arguments, message, capsys):
    assert main(["fit", *arguments, "--no-cache"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mixjax: ")
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_rows_and_columns_left_out_are_told_once(tmp_path, capsys):
    frame = table("sleepstudy").copy().assign(twice=lambda d: 2 * d["Days"])
    frame.loc[0, "Reaction"] = None
    frame.to_csv(tmp_path / "data.csv", index=False)
    arguments = ["fit", "Reaction ~ Days + twice + (Days | Subject)", str(tmp_path / "data.csv"), "--no-cache"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "1 rows left out" in captured.out
    assert "columns left out: twice" in captured.out
    assert captured.err == ""
    assert main([*arguments, "--json"]) == 0  # which does not say it
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "mixjax: 1 of 180 rows left out because of missing values (Reaction 1)"
    assert said[1:] == ["mixjax: fixed-effects columns left out because other columns determine them: twice"]


def test_rows_left_out_are_told_when_the_fit_fails(tmp_path, capsys):
    frame = table("sleepstudy").iloc[:20].assign(Reaction=[None] * 10 + [250.0] * 10)
    frame.to_csv(tmp_path / "data.csv", index=False)
    assert main(["fit", FORMULA, str(tmp_path / "data.csv"), "--no-cache"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "10 of 20 rows left out" in first
    assert "is constant" in second


@pytest.mark.parametrize("ddf", ["satterthwaite", "kenward-roger", "wald"])
def test_p_values(ddf, capsys):
    fit = fit_of("sleepstudy_slopes", "REML")
    assert main(["fit", FORMULA, "sleepstudy", "--ddf", ddf, "--no-cache"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(fit.summary(ddf))
    assert captured.err == ""
    assert main(["fit", FORMULA, "sleepstudy", "--ddf", ddf, "--json", "--no-cache"]) == 0
    result = json.loads(capsys.readouterr().out)
    tests = fit.tidy(ddf).query("effect == 'fixed'").set_index("term")
    assert result["ddf"] == ddf
    for name, column in (("se", "std_error"), ("statistic", "statistic"), ("p_value", "p_value")):
        assert result[name] == pytest.approx(tests[column].to_dict(), rel=1e-9)
    assert result["df"] == (
        {"Intercept": None, "Days": None} if ddf == "wald" else pytest.approx(tests["df"].to_dict())
    )


def test_profile_intervals_and_their_warning_as_one_line(capsys):
    assert main(["fit", FORMULA, "sleepstudy", "--confint", "profile", "--no-cache"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(str(fit_of("sleepstudy_slopes", "REML").summary()))
    rows = captured.out.split("95 % confidence intervals (profile likelihood):\n")[1].splitlines()
    assert rows[0].split() == ["lower", "upper"]
    assert rows[1].split() == ["sd_Intercept|Subject", "14.381", "37.716"]  # lme4: 14.38, 37.72
    (warning,) = captured.err.splitlines()
    assert warning.startswith("mixjax: profiles are of the ML deviance")
    assert main(["fit", FORMULA, "sleepstudy", "--ml", "--confint", "profile", "--json", "--no-cache"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)["confint"]
    expected = fit_of("sleepstudy_slopes", "ML").confint()
    assert (found["method"], found["level"]) == ("profile", 0.95)
    for side in ("lower", "upper"):
        assert found[side] == pytest.approx(expected[side].to_dict(), rel=1e-6)


def test_wald_intervals_have_the_degrees_of_freedom_of_the_tests(capsys):
    arguments = ["fit", FORMULA, "sleepstudy", "--confint", "wald", "--ddf", "satterthwaite", "--json", "--no-cache"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["confint"]
    expected = fit_of("sleepstudy_slopes", "REML").confint(method="wald", ddf="satterthwaite")
    assert found["upper"] == pytest.approx(expected["upper"].to_dict(), rel=1e-9)


def test_an_interval_that_does_not_exist_is_null(capsys):
    arguments = ["fit", "Yield ~ 1 + (1 | Batch)", "dyestuff2", "--confint", "wald", "--no-cache"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["confint"]["lower"]["sd_Intercept|Batch"] is None
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert ["sd_Intercept|Batch", "none", "none"] in [line.split() for line in out.splitlines()]


def status_of(arguments):
    """The exit status; argparse leaves by an exception of its own."""
    try:
        return main(arguments)
    except SystemExit as left:
        return left.code


def test_wrong_usage():
    assert status_of(["fit"]) == 2


# --- whatever happens, no traceback -------------------------------------------------------------------------------


def test_dispersion_and_residual(tmp_path, capsys):
    path = tmp_path / "data.csv"
    mj.datasets.load("Orthodont").assign(Subject=lambda d: d["Subject"].cat.codes).to_csv(path, index=False)
    own = ["--dispersion", "~ Sex", "--residual", "car1(age | Subject)", "--json", "--ref", "Sex=Male"]
    assert main(["fit", "distance ~ age * Sex", str(path), *own]) == 0
    found = json.loads(capsys.readouterr().out)
    fit = mj.lmm("distance ~ age * Sex", mj.datasets.load("Orthodont"), dispersion="~ Sex",
                 residual="car1(age | Subject)")  # fmt: skip
    assert found["criterion"] == pytest.approx(fit.criterion, abs=1e-8)
    assert list(found["residual"]) == ["disp~Sex[T.Female]", "rho|Subject"]
    assert list(found["residual"].values()) == pytest.approx(fit.estimates.residual.tolist(), rel=1e-6)
    assert main(["fit", "y ~ x + (1 | g)", str(path), "--family", "poisson", "--residual", "ar1(x | g)"]) == 2
    assert "--residual: for linear models" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            SyntaxError("invalid syntax", ("", 1, 3, "log(+)\n")),
            "the formula cannot be read: invalid syntax in 'log(+)'",
        ),
        (RecursionError("maximum recursion depth exceeded"), "the formula is nested too deeply to be read"),
        (MemoryError(), "out of memory; fewer rows, levels or replicates need less"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 8 bytes"), "out of memory; fewer rows"),
        (IsADirectoryError(21, "Is a directory", "programs"), "programs: Is a directory"),
        (PermissionError(13, "Permission denied", "power.png"), "power.png: Permission denied"),
        (UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "unexpected end of data"), "can't decode byte 0xe9"),
        (ValueError("two\nlines"), "two lines"),
        (KeyError("Days"), "unexpected KeyError: 'Days'; --debug shows where. Please report it"),
        (AttributeError("no attribute"), "unexpected AttributeError: no attribute; --debug shows where"),
        (OverflowError("too large"), "unexpected OverflowError: too large; --debug"),
        (AssertionError(), "unexpected AssertionError: ; --debug"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_an_error_is_one_line_and_status_2(error, message, debug, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(mj, "lmm", fail)
    assert main(["fit", FORMULA, "sleepstudy", "--no-cache", *["--debug"] * debug]) == 2
    captured = capsys.readouterr()
    *traceback, line = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith("mixjax: ")
    assert message in line
    assert ("Traceback" in captured.err) == debug == bool(traceback)


def test_an_interrupt_is_status_130(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(mj, "lmm", interrupt)
    assert main(["fit", FORMULA, "sleepstudy", "--no-cache"]) == 130
    assert capsys.readouterr().err == "mixjax: interrupted\n"


def test_a_reader_that_stops_reading_is_no_error():
    """As ``mixjax fit ... | head -1`` does, but surely before anything is written."""
    command = [sys.executable, "-m", "mixjax", "fit", FORMULA, "sleepstudy", "--no-cache"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_names_that_the_terminal_cannot_show(tmp_path):
    table("sleepstudy").rename(columns={"Days": "Jours_é"}).to_csv(tmp_path / "data.csv", index=False)
    command = [sys.executable, "-m", "mixjax", "fit", "Reaction ~ Jours_é + (1 | Subject)", str(tmp_path / "data.csv")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run([*command, "--no-cache"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"Jours_\xe9" in done.stdout


def test_default_folder_is_under_the_users_cache_directory(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("MIXJAX_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR")}
    code = "import mixjax as mj; print(mj.enable_compilation_cache())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(tmp_path / "mixjax"), done.stderr


def test_a_cache_that_cannot_be_made_does_not_stop_the_fit(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(["fit", FORMULA, "sleepstudy", "--cache-dir", str(tmp_path / "file" / "programs")]) == 0
    captured = capsys.readouterr()
    assert "1743.6" in captured.out
    assert "compiled programs are not kept" in captured.err


def test_other_separators_and_unreadable_files(tmp_path, capsys):
    table("sleepstudy").to_csv(tmp_path / "data.csv", index=False, sep=";")
    assert main(["fit", FORMULA, str(tmp_path / "data.csv"), "--sep", ";", "--no-cache"]) == 0
    (tmp_path / "empty.csv").write_text("")
    assert main(["fit", FORMULA, str(tmp_path / "empty.csv"), "--no-cache"]) == 2
    assert "empty.csv is empty" in capsys.readouterr().err
    assert main(["fit", FORMULA, "sleepstdy", "--no-cache"]) == 2
    assert "did you mean 'sleepstudy'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("separator", "shown", "decimal"),
    [(";", ";", ","), ("\t", r"\t", "."), ("|", "|", "."), (" ", " ", "."), (",", ",", ".")],
)
def test_a_file_with_another_separator_says_which(separator, shown, decimal, tmp_path, capsys):
    table("sleepstudy").to_csv(tmp_path / "data.csv", index=False, sep=separator, decimal=decimal)
    asked = ["--sep", ";"] if separator == "," else []
    assert main(["fit", FORMULA, str(tmp_path / "data.csv"), *asked, "--no-cache"]) == 2
    assert f"add --sep '{shown}'" in capsys.readouterr().err
    if decimal == ".":
        assert main(["fit", FORMULA, str(tmp_path / "data.csv"), "--sep", shown, "--no-cache"]) == 0
        assert "1743.6" in capsys.readouterr().out


POWER = [
    "power",
    "y ~ x + (x | g)",
    "--beta",
    "0,0.5",
    "--sd",
    "1,0.5",
    "--per-group",
    "6",
    "--test",
    "x",
    "--no-cache",
]


def test_power_prints_a_table_and_writes_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason='pip install "mixjax[plots]"')
    picture = tmp_path / "power.png"
    arguments = ["--groups", "6:30:4", "--x", "normal", "--target", "0.8", "--replicates", "500", "--cor", "0.2"]
    assert main([*POWER, *arguments, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("power of x at level 0.05, by groups")
    assert "smallest groups allowed with power 0.8" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_power_is_that_of_the_same_study_in_python(capsys):
    assert main([*POWER, "--groups", "8,12", "--x", "x=between", "--replicates", "300", "--key", "3"]) == 0
    out = capsys.readouterr().out

    def source(groups):
        g = np.repeat(np.arange(groups), 6)
        data = pd.DataFrame({"g": g, "x": (g % 2).astype(float)})
        return mj.scenario("y ~ x + (x | g)", data, beta=[0, 0.5], sd=[1, 0.5], sigma=1)

    sizes = {"groups": [8, 12]}
    expected = mj.power_curve(source, "y ~ x + (x | g)", "x", sizes, replicates=300, key=3, progress=False)
    assert out.strip() == str(expected)


@pytest.fixture
def nothing_is_simulated(monkeypatch):
    """What is wrong is said before, however long the simulation would take."""

    def started(*_, **__):
        raise AssertionError("the simulation has begun")

    monkeypatch.setattr("mixjax.studies.power.study", started)
    monkeypatch.setattr("jax._src.compiler.compile_or_get_cached", started, raising=False)  # private


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--x", "sometimes"], "a predictor is made between, within or normal"),
        ([], "--x must say how x is made"),
        (["--x", "z=normal"], "--x names 'z'; the predictors are x"),
        (["--x", "normal", "--x", "between"], "--x 'between': nothing is left to be made so"),
        (["--x", "x=normal", "--x", "x=between"], "--x 'x=between': nothing is left to be made so"),
        (["--x", "normal", "--test", "dose"], "no fixed effect 'dose'"),
        (["--x", "normal", "--beta", "0,0.5,1"], "beta has shape (3,)"),
        (["--x", "normal", "--beta", "0"], "beta has shape (1,)"),
        (["--sd", "1", "--cor", "0.2"], "--cor is the correlation of two random effects, and --sd has one"),
        (["--x", "normal", "--sd", "1"], "sd has shape (1,)"),
        (["--x", "normal", "--target", "0.8", "--alpha", "0.9"], "--target 0.8 must be larger than --alpha 0.9"),
        (["--groups", "1000000", "--per-group", "100"], "make 100000000 rows, more than 10000000: take fewer"),
        (["--plot", "power.gif"], "--plot power.gif: the name must end in .png, .pdf, .svg"),
        (["--plot", "no/such/folder/power.png"], "no file can be written there"),
    ],
)
def test_power_says_what_is_wrong_before_it_simulates(change, message, nothing_is_simulated, capsys):
    assert main([*POWER, "--groups", "8", *change]) == 2
    assert message in capsys.readouterr().err


UNREADABLE = [
    ("--beta", "0,x", "'x' is not a number"),
    ("--beta", "0,,1", "'' is not a number"),
    ("--beta", "0,inf", "must be finite, got inf"),
    ("--beta", "nan,0", "must be finite, got nan"),
    ("--sd", "1,-0.5", "must be 0 or more, got -0.5"),
    ("--sd", "-1,0.5", "must be 0 or more, got -1"),
    ("--sd", "1,inf", "must be 0 or more, got inf"),
    ("--sigma", "-1", "must be 0 or more, got -1"),
    ("--cor", "1.5", "must be -1 to 1, got 1.5"),
    ("--cor", "-1.5", "must be -1 to 1, got -1.5"),
    ("--alpha", "0", "must lie between 0 and 1, got 0"),
    ("--alpha", "5", "must be 0 to 1, got 5"),
    ("--target", "80", "must be 0 to 1, got 80"),
    ("--target", "1", "must lie between 0 and 1, got 1"),
    ("--groups", "1", "must be 2 or more, got 1"),
    ("--groups", "8,x", "'x' is not a whole number"),
    ("--groups", "8.5", "'8.5' is not a whole number"),
    ("--groups", "60:10", "'60:10' is empty: it ends before it begins"),
    ("--groups", "10,20,10", "'10,20,10' names a number twice"),
    ("--groups", "10:60:0", "must be 1 or more, got 0"),
    ("--groups", "10:60:-10", "must be 1 or more, got -10"),
    ("--groups", "10:60:10:2", "is not first:last or first:last:step"),
    ("--groups", "2:1000000000", "has more than 10000 numbers: take a larger step"),
    ("--groups", f"2:{10**30}", "has more than 10000 numbers: take a larger step"),
    ("--per-group", "0", "must be 1 or more, got 0"),
    ("--per-group", "many", "'many' is not a whole number"),
    ("--replicates", "0", "must be 1 or more, got 0"),
    ("--key", "-1", "must be 0 or more, got -1"),
    ("--key", str(2**64), "must be 0 or more, up to 9223372036854775807, got"),
    ("--ddf", "exact", "invalid choice: 'exact'"),
]


@pytest.mark.parametrize(("option", "value", "message"), UNREADABLE)
def test_options_of_power_that_cannot_be(option, value, message, capsys):
    assert status_of([*POWER, "--groups", "8", "--x", "normal", option, value]) == 2
    said = capsys.readouterr().err
    assert f"error: argument {option}: " in said
    assert message in said


def test_options_are_read_without_loading_jax():
    code = "import sys; from mixjax.cli import main\ntry: main(sys.argv[1:])\nfinally: print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *POWER, "--groups", "60:10"], capture_output=True, text=True)
    assert done.stdout.strip() == "False"
    assert "is empty" in done.stderr


def test_a_number_may_be_negative(capsys):
    arguments = [*POWER, "--groups", "8", "--x", "between", "--replicates", "50", "--beta", "-1,-.5", "--cor", "-.2"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("power of x")


def test_power_of_several_factors_points_to_python(capsys):
    code = main(["power", "y ~ x + (1 | g) + (1 | h)", *POWER[2:], "--groups", "8", "--x", "normal"])
    assert code == 2
    assert "use mixjax.power_curve in Python" in capsys.readouterr().err


def test_contrasts_and_rs_words(capsys):
    formula = "angle ~ recipe + temp + (recipe | replicate)"
    arguments = ["fit", formula, "cake", "--contrasts", "recipe=sum", "--ddf", "Kenward-Roger", "--confint", "Wald"]
    assert main([*arguments, "--json", "--no-cache"]) == 0
    found = json.loads(capsys.readouterr().out)
    fit = mj.lmm(formula, table("cake"), contrasts={"recipe": "sum"})
    assert found["theta"] == fit.theta.tolist()
    assert list(found["fixef"]) == list(fit.labels.fixed) == ["Intercept", "recipe[S.A]", "recipe[S.B]", "temp"]
    assert (found["ddf"], found["confint"]["method"]) == ("kenward-roger", "wald")
    np.testing.assert_allclose(list(found["df"].values()), fit.tidy("KR")["df"].iloc[:4], rtol=1e-9)


@pytest.mark.parametrize(
    ("contrasts", "message"),
    [
        (["recipe=summ"], "contrasts for 'recipe' must be one of treatment, SAS, sum"),
        (["replicate=sum"], "contrasts= names 'replicate', which is in none of the effects"),
        (["recipe=sum", "recipe=poly"], "--contrasts names a column more than once"),
        (["recipe"], "'recipe' is not COLUMN=KIND, as in recipe=sum"),
    ],
)
def test_contrasts_that_cannot_be(contrasts, message, capsys):
    options = [word for one in contrasts for word in ("--contrasts", one)]
    with contextlib.suppress(SystemExit):
        assert main(["fit", "angle ~ recipe + (1 | replicate)", "cake", "--no-cache", *options]) == 2
    assert message in capsys.readouterr().err


QUADRATIC = ["power", "y ~ poly(x, 2) + (1 | g)", "--sd", "1", "--groups", "10,12", "--per-group", "4", "--x", "within",
         "--replicates", "32", "--no-cache"]  # fmt: skip


def test_coefficients_by_name(capsys):
    named = ["--beta", "poly(x, 2)1=0.5, (Intercept)=-1,poly(x,2)[2]=0", "--test", "poly(x, 2)1"]
    assert main([*QUADRATIC, *named]) == 0
    by_name = capsys.readouterr().out
    assert main([*QUADRATIC, "--beta", "-1,0.5,0", "--test", "poly(x, 2)[1]"]) == 0
    assert by_name.splitlines()[1:] == capsys.readouterr().out.splitlines()[1:]


@pytest.mark.parametrize(
    ("beta", "message"),
    [
        ("0,x=1", "'0' is not NAME=NUMBER"),
        ("x=1,x=2", "'x' is there twice"),
        ("x=one", "'one' is not a number"),
        ("(Intercept)=0", "beta has no value of poly"),
        ("(Intercept)=0,poly(x, 2)[1]=1,poly(x, 2)[2]=0,z=2", "beta names 'z'"),
    ],
)
def test_coefficients_that_cannot_be(beta, message, capsys):
    with contextlib.suppress(SystemExit):
        assert main([*QUADRATIC, "--beta", beta, "--test", "poly(x, 2)[1]"]) == 2
    assert message in capsys.readouterr().err


# --- generalised models ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cbpp_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("cbpp") / "cbpp.csv"
    glmm_cases.case("cbpp").table.to_csv(path, index=False)
    return str(path)


COUNTS = "incidence / size ~ period + (1 | herd)"


def test_a_family_is_fitted(cbpp_file, capsys):
    arguments = ["fit", COUNTS, cbpp_file, "--family", "binomial", "--size", "size", "--ref", "period=1", "--no-cache"]
    assert main([*arguments, "--confint", "wald", "--exponentiate"]) == 0
    out = capsys.readouterr().out
    fit = glmm_cases.fit_of("cbpp")
    assert "Family: binomial (logit)" in out
    ratios = out.partition("Odds ratios with 95 % intervals (Wald):")[2].splitlines()
    row = next(line.split() for line in ratios if line.startswith("period[T.2]"))
    ends = np.exp(fit.confint("period[T.2]", method="wald").to_numpy()[0])
    assert [float(x) for x in row[1:]] == pytest.approx([np.exp(fit.fixef["period[T.2]"]), *ends], rel=1e-4)
    assert main([*arguments, "--json", "--link", "probit"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["link"], found["dispersion"]) == ("binomial", "probit", {})
    assert found["p_value"]["period[T.2]"] < 0.01
    assert "sigma" not in found


def test_power_of_a_family(capsys):
    arguments = ["power", "y ~ x + (1 | g)", "--beta", "0,0.8", "--sd", "0.5", "--groups", "12", "--per-group", "6"]
    arguments += ["--x", "normal", "--test", "x", "--family", "nbinom", "--dispersion", "2", "--replicates", "20"]
    assert main([*arguments, "--no-cache"]) == 0
    assert "power of x at level 0.05, by groups" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "size"], "--size: for generalised models; name the --family"),
        (["--nagq", "3", "--exponentiate"], "--nagq, --exponentiate: for generalised models"),
        (["--family", "poisson", "--ddf", "wald", "--ml"], "--ml, --ddf: for linear models"),
        (["--family", "gama"], "did you mean 'gamma'?"),
        (
            ["--family", "gamma", "--link", "inverse", "--exponentiate"],
            "effects are ratios for the links logit, log, cloglog",
        ),
    ],
)
def test_options_of_the_other_kind_of_model(cbpp_file, capsys, options, message):
    formula = "size ~ period + (1 | herd)"
    assert main(["fit", formula, cbpp_file, "--no-cache", *options]) == 2
    assert message in capsys.readouterr().err


def test_power_options_of_the_other_kind_of_model(capsys):
    arguments = ["power", "y ~ x + (1 | g)", "--beta", "0,0.8", "--sd", "0.5", "--groups", "12", "--per-group", "6"]
    arguments += ["--x", "normal", "--test", "x", "--no-cache"]
    assert main([*arguments, "--trials", "3"]) == 2
    assert "--trials: for generalised models" in capsys.readouterr().err
    assert main([*arguments, "--family", "poisson", "--sigma", "1"]) == 2
    assert "--sigma: for linear models" in capsys.readouterr().err


def test_extra_zeros_and_dispersions_of_a_family(tmp_path, capsys):
    mj.datasets.load("grouseticks").to_csv(tmp_path / "ticks.csv", index=False)
    arguments = [
        "fit",
        "TICKS ~ cHEIGHT + (1 | LOCATION)",
        str(tmp_path / "ticks.csv"),
        "--family",
        "nbinom",
        "--no-cache",
    ]
    assert main([*arguments, "--dispformula", "~ cHEIGHT", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["disp"]) == ["Intercept", "cHEIGHT"]
    assert "zi" not in found
    assert main([*arguments[:4], "nbinom", "--ziformula", "TICKS ~ (1 | BROOD)", "--no-cache"]) == 2
    assert "ziformula" in capsys.readouterr().err
    assert main([*arguments[:3], "--ziformula", "~ 1", "--no-cache"]) == 2
    assert "--ziformula: for generalised models" in capsys.readouterr().err
