"""The documentation: its reference is current, its links lead somewhere, and the files that it names exist."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pmpo_megatron.algo import exponent
from pmpo_megatron.algo.exponent import ExponentRule
from pmpo_megatron.algo.power_sums import OrderInterval, PowerSums, tabulate

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples/README.md",
]
CODE_BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w/.])(?:tools|examples|tests|docs|requirements|pmpo_megatron|\.ci)/[\w./-]*\w/?")
MODULE = re.compile(r"(?<![\w/.])pmpo_megatron(?:\.\w+)+")
MADE_BY_THE_READER = {"pmpo_megatron/hf/mistral.py"}  # what the documentation asks for; not files of the project


def page_name(page):
    return str(page.relative_to(ROOT))


def anchors(page):
    """The names that a Markdown viewer gives to the headings of ``page``."""
    headings = re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", page.read_text()), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.replace(" ", "-") for text in plain}


def broken_links(page):
    for target in LINK.findall(CODE_BLOCK.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists():
            yield f"{target}: no such file"
        elif anchor and anchor not in anchors(file):
            yield f"{target}: no such heading; there are {', '.join(sorted(anchors(file)))}"


def exists_in_package(name):
    """Whether ``name`` is a module or package, or a module followed by words that occur in its text. Imports nothing."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        if path.with_suffix(".py").is_file():
            text = path.with_suffix(".py").read_text()
            return all(re.search(rf"\b{part}\b", text) for part in parts[count:])
        if path.is_dir():
            return count == len(parts)
    return False


def test_the_configuration_reference_is_current():
    tool = [sys.executable, "tools/make_config_reference.py", "--check"]
    found = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert found.returncode == 0, found.stderr


def test_an_outdated_reference_is_noticed(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("make_config_reference", ROOT / "tools/make_config_reference.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    tool.PAGE = tmp_path / "configuration.md"
    monkeypatch.setattr(sys, "argv", ["tool"])
    tool.main()
    assert tool.PAGE.read_text() == (ROOT / "docs/configuration.md").read_text()
    tool.PAGE.write_text(tool.PAGE.read_text().replace("`max_skipped_steps` | int | `3`", "`max_skipped_steps` | int | `4`"))
    monkeypatch.setattr(sys, "argv", ["tool", "--check"])
    with pytest.raises(SystemExit, match="run tools/make_config_reference.py"):
        tool.main()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    assert not list(broken_links(page))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_and_modules_that_are_named_exist(page):
    text = page.read_text()
    files = {name for name in PATH.findall(text) if name.rstrip("/") not in MADE_BY_THE_READER}
    absent = sorted(name for name in files if not (ROOT / name).exists())
    assert not absent
    assert not sorted(name for name in set(MODULE.findall(text)) if not exists_in_package(name))


class TestTheExampleOfARule:
    """docs/adding_a_rule.md, executed: its function equals its plain form, and its changes fit the code as it is."""

    text = (ROOT / "docs/adding_a_rule.md").read_text()
    function, plain, extra = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    rule = ExponentRule("ess_quadratic", ess_floor=0.8)

    def test_the_function_equals_its_plain_form(self):
        names, lengths = dict(vars(exponent)), (1, 2, 7, 300)
        exec(self.function, names)
        exec(f"def choose_p(x, f, rule, flat):\n{self.plain}", names | {"math": math}, names)
        generator = torch.Generator().manual_seed(0)
        x_T = [torch.randn(length, generator=generator, dtype=torch.float64).clamp(max=1) for length in lengths]
        x_T.append(torch.full((5,), 0.2, dtype=torch.float64))
        fractions = [0.0, 0.5, 2 / 7, 0.01, 1.0]
        p_N, target_N = names["_ess_quadratic"](self.rule, self.sums(x_T), torch.tensor(fractions, dtype=torch.float64), 0.0)
        flat = [True, False, False, False, True]
        expected = [names["choose_p"](x, f, self.rule, is_flat) for x, f, is_flat in zip(x_T, fractions, flat, strict=True)]
        assert p_N.tolist() == pytest.approx([p for p, _ in expected], abs=1e-9)
        assert target_N.tolist() == pytest.approx([target for _, target in expected])
        assert any(0 < p < 1 for p, _ in expected)

    def sums(self, x_T):
        interval, x = OrderInterval.covering(0.0, 1.0), torch.cat(x_T)
        segment_T = torch.cat([torch.full((len(part),), i + 1) for i, part in enumerate(x_T)])
        no, yes = torch.zeros_like(x, dtype=torch.bool), torch.ones_like(x, dtype=torch.bool)
        return PowerSums.read(tabulate(x, segment_T, len(x_T), clipped_T=no, finite_T=yes, interval=interval), interval)

    def test_the_lines_to_change_are_there(self):
        code = (ROOT / "pmpo_megatron/algo/objective_config.py").read_text().splitlines()
        [diff] = re.findall(r"^```diff\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        old = [line[1:] for line in diff.splitlines() if not line.startswith("+")]
        assert len(old) == 5 and all(code.count(line) == 1 for line in old)

    def test_where_the_text_says_that_lines_go_they_fit(self):
        assert self.extra.strip().startswith('"quadratic": ObjectiveConfig(')
        assert "\nEXTRA = {\n" in (ROOT / "tests/unit/algo/test_objective.py").read_text()
        reference = (ROOT / "tests/unit/algo/reference.py").read_text()
        body = reference.partition("def choose_p(x, f, config, progress):")[2].partition("\n\n\n")[0].splitlines()
        assert body[-3].startswith("    target = ") and body[-1].startswith("    return ")


def cited_headings(text):
    """(page, heading) of every citation such as docs/objective.md, "The formulas", also where it is broken over lines."""
    return re.findall(r'(docs/\w+\.md),\s+(?:#\s*)?"([^"]+)"', text)


def test_headings_that_code_and_tools_cite_exist():
    sources = [*(ROOT / "pmpo_megatron").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    cited = {(source, *found) for source in sources for found in cited_headings(source.read_text())}
    assert cited
    for source, page, heading in cited:
        assert re.search(rf"^#+ {re.escape(heading)}$", (ROOT / page).read_text(), re.MULTILINE), (source, page, heading)


def test_code_cites_pages_by_heading():
    for source in (ROOT / "pmpo_megatron").rglob("*.py"):
        assert not re.search(r"\w+\.md sections? \d", source.read_text()), f"{source}: cite docs/PAGE.md by heading"


def test_every_page_is_in_the_readme():
    links = LINK.findall((ROOT / "README.md").read_text())
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= {link.partition("#")[0] for link in links}


def test_a_broken_link_and_an_absent_file_would_be_noticed(tmp_path):
    (tmp_path / "there.md").write_text("# The `one` heading, and more\n")
    page = tmp_path / "page.md"
    page.write_text("[a](there.md#the-one-heading-and-more) [b](there.md#other) [c](gone.md)\n```\n[d](in-code.md)\n```\n")
    assert [problem.split(":")[0] for problem in broken_links(page)] == ["there.md#other", "gone.md"]
    assert PATH.findall("`python tools/plan_run.py`, examples/common/launch.sh, /models/x") == [
        "tools/plan_run.py",
        "examples/common/launch.sh",
    ]
    assert exists_in_package("pmpo_megatron.commands.train") and exists_in_package(
        "pmpo_megatron.bridge.vllm_worker.WeightReceiver"
    )
    assert not exists_in_package("pmpo_megatron.gone") and not exists_in_package("pmpo_megatron.commands.train.gone_function")
