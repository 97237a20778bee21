"""What a release consists of agrees with itself: versions, addresses, dependencies, links of the README."""

import importlib.util
import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest

import mixjax as mj

ROOT = Path(__file__).parent.parent
if not (ROOT / "pyproject.toml").exists():
    pytest.skip("the tests are not in the repository", allow_module_level=True)

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SOURCE = PROJECT["urls"]["Source"]
FORGE = ROOT / ".github"
in_the_repository = pytest.mark.skipif(not FORGE.exists(), reason="the sdist has no files of the forge")


def text_of(*parts):
    return ROOT.joinpath(*parts).read_text("utf-8")


@pytest.fixture(scope="module")
def readme():
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the README on a package index -----------------------------------------------------------------------------------


def test_no_link_of_the_readme_is_relative_on_an_index(readme):
    text = readme.absolute(text_of("README.md"), SOURCE, "v1")
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))
    assert len(links) > 20
    assert all(link.startswith("https://") for link in links)
    assert re.search(rf"!\[[^\]]*\]\({re.escape(SOURCE)}/raw/v1/docs/gallery/\w+\.png\)", text)
    assert f"({SOURCE}/blob/v1/docs/limitations.md)" in text
    assert f"({SOURCE}/tree/v1/notebooks)" in text


def test_links_that_lead_nowhere_are_refused_and_code_is_left(readme):
    code = "```python\na[i](x)\n```"
    assert readme.absolute(code, SOURCE, "v1") == code
    for same in ("[a](https://b.org)", "[a](#place)", "[a](mailto:a@b.org)"):
        assert readme.absolute(same, SOURCE, "v1") == same
    assert readme.absolute("[a](docs/mmrm.md#x)", SOURCE + "/", "main") == f"[a]({SOURCE}/blob/main/docs/mmrm.md#x)"
    with pytest.raises(ValueError, match=r"links to docs/nothing\.md"):
        readme.absolute("[a](docs/nothing.md)", SOURCE, "v1")


# --- one version, one address ----------------------------------------------------------------------------------------


def test_versions_agree():
    assert re.search(r"^version: (\S+)$", text_of("CITATION.cff"), flags=re.MULTILINE)[1] == mj.__version__
    recipe = text_of(".ci", "conda", "recipe.yaml")
    assert re.search(r"^  version: (\S+)$", recipe, flags=re.MULTILINE)[1] == mj.__version__
    assert re.search(r"^## (\S+)", text_of("CHANGELOG.md"), flags=re.MULTILINE)[1] == mj.__version__


def test_addresses_agree():
    """Those of the repository and of its documents, wherever they stand."""
    documents = PROJECT["urls"]["Documentation"]
    owner = SOURCE.split("/")[-2]
    pages = [ROOT / "CITATION.cff", ROOT / ".ci" / "conda" / "recipe.yaml", *FORGE.rglob("*.yml")]
    for page in pages:
        text = page.read_text("utf-8")
        for url in re.findall(r"https://\S*mixjax[^\s\"')]*", text):
            if "pypi.org" not in url:
                assert url.startswith((SOURCE, documents)), (page.name, url)
        if owner != "OWNER":
            assert "OWNER" not in text, page
    for url in PROJECT["urls"].values():
        assert url.startswith((SOURCE, documents))


def test_the_recipe_asks_for_what_the_project_asks_for():
    recipe = text_of(".ci", "conda", "recipe.yaml")

    def listed(key):
        block = re.search(rf"^  {key}:.*\n((?:    - .*\n)+)", recipe, flags=re.MULTILINE)[1]
        return dict(re.findall(r"- ([\w-]+) >=(\S+)", block))

    bounds = dict(re.findall(r"([\w-]+)>=([\w.,!=]+)", " ".join(PROJECT["dependencies"])))
    assert listed("run") == {"python": PROJECT["requires-python"].removeprefix(">="), **bounds}
    extras = {k: v for k, v in PROJECT["optional-dependencies"].items() if k not in ("docs", "test", "cuda")}
    optional = dict(re.findall(r"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)", " ".join(chain(*extras.values()))))
    optional["matplotlib-base"] = optional.pop("matplotlib")
    assert listed("run_constraints") == optional
    assert re.findall(r"- (\w+ = \S+)", recipe) == [f"{k} = {v}" for k, v in PROJECT["scripts"].items()]


def test_extras_agree_on_their_bounds():
    """One bound a package, wherever it is asked for."""
    lines = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    found = {}
    for name, bound in re.findall(r"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)", " ".join(lines)):
        found.setdefault(name, set()).add(bound)
    assert not {name: bounds for name, bounds in found.items() if len(bounds) > 1}


# --- the forge -------------------------------------------------------------------------------------------------------


@in_the_repository
def test_files_of_the_forge_can_be_read():
    yaml = pytest.importorskip("yaml")
    for path in FORGE.rglob("*.yml"):
        loaded = yaml.safe_load(path.read_text("utf-8"))
        if path.parent.name == "workflows":
            assert loaded["permissions"] == {"contents": "read"}, path.name
            assert all({"runs-on", "steps"} <= set(job) for job in loaded["jobs"].values()), path.name
    jobs = yaml.safe_load(text_of(".github", "workflows", "ci.yml"))["jobs"]
    assert set(jobs) == {"lint", "tests", "lowest", "float32", "docs", "package"}
    tried = jobs["tests"]["strategy"]["matrix"]["python"]
    told = [line.split(" :: ")[-1] for line in PROJECT["classifiers"]]
    assert tried == [version for version in told if re.fullmatch(r"3\.\d+", version)]
    assert jobs["lowest"]["steps"][1]["with"]["python-version"] == PROJECT["requires-python"].removeprefix(">=")
    systems = {row["os"] for row in jobs["tests"]["strategy"]["matrix"]["include"]}
    assert systems == {"macos-latest", "windows-latest"}


@in_the_repository
def test_the_forms_ask_for_versions():
    for name in ("bug.yml", "wrong_number.yml"):
        assert "mixjax.show_versions()" in text_of(".github", "ISSUE_TEMPLATE", name)


def test_what_the_sdist_has_is_there():
    build = tomllib.loads(text_of("pyproject.toml"))["tool"]["hatch"]["build"]["targets"]
    assert {"/tests", "/benchmarks", "/docs", "/.ci"} <= set(build["sdist"]["include"])
    # The package itself is not there where an installed one is tested.
    assert all((ROOT / path[1:]).exists() for path in build["sdist"]["include"] if path != "/mixjax")
