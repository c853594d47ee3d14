"""The documentation: its reference is current, its links lead somewhere, and the files that it names exist."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from pmpo_megatron.algo.objective import ObjectiveConfig, evaluate_objective
from pmpo_megatron.config import build, to_plain
from pmpo_megatron.errors import ConfigError, MappingError
from pmpo_megatron.hf.mapping import WeightMapping
from pmpo_megatron.hf.shape import ARCHITECTURES, Architecture, shape_of

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
    check = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert check.returncode == 0, check.stderr


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
    assert not sorted(name for name in set(PATH.findall(text)) if not (ROOT / name).exists())
    assert not sorted(name for name in set(MODULE.findall(text)) if not exists_in_package(name))


def test_the_example_of_an_architecture_is_complete(monkeypatch):
    """docs/adding_an_architecture.md: its row alone gives the tensors of transformers' own Mistral, and refuses a window."""
    row = re.search(r"^ARCHITECTURES\[.*\] = .*$", (ROOT / "docs/adding_an_architecture.md").read_text(), re.MULTILINE)[0]
    monkeypatch.setattr("pmpo_megatron.hf.shape.ARCHITECTURES", table := dict(ARCHITECTURES))
    exec(row, {"ARCHITECTURES": table, "Architecture": Architecture})
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.MistralConfig(**sizes, vocab_size=100, sliding_window=None, architectures=["MistralForCausalLM"])
    tensors = transformers.MistralForCausalLM(config).named_parameters()
    shapes = WeightMapping(shape_of(config.to_dict())).hf_shapes
    assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors}
    with pytest.raises(MappingError, match="sliding_window is 4096; only full attention"):
        shape_of(config.to_dict() | {"sliding_window": 4096})


class TestTheExampleOfARule:
    """docs/adding_a_rule.md: its file, written as it stands there, is found, checked and used by the name in its YAML."""

    text = (ROOT / "docs/adding_a_rule.md").read_text()

    @pytest.fixture
    def values(self, tmp_path, monkeypatch):
        """The section of the page's YAML, with the page's file where Python finds it."""
        [code] = re.findall(r"^```python\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        [values] = re.findall(r"^```yaml\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        (tmp_path / "my_rules.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        yield yaml.safe_load(values)["objective"]
        sys.modules.pop("my_rules", None)

    def test_it_equals_its_plain_form(self, values):
        config, lengths = build(ObjectiveConfig, values), (1, 2, 7, 300, 5)
        generator = torch.Generator().manual_seed(0)
        x_T = [torch.randn(length, generator=generator, dtype=torch.float64) for length in lengths]
        x_T[-1] = torch.full((5,), 0.2, dtype=torch.float64)
        trajectory_T = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
        ones_N, zeros_T = torch.ones(len(lengths)), torch.zeros(sum(lengths), dtype=torch.float64)
        order_T = torch.randperm(sum(lengths), generator=generator)
        out = evaluate_objective(torch.cat(x_T)[order_T], zeros_T, trajectory_T[order_T], ones_N, ones_N, config)
        for x, p, ess in zip(x_T, out.p_N.tolist(), out.target_ess_N.tolist(), strict=True):
            target = 0.8 + 0.2 * float((x > 0.4).double().mean())
            variance = float(x.clamp(max=0.4).var(correction=0))
            expected = 1.0 if variance < 1e-12 else min(1.0, math.sqrt((1 / target - 1) / variance))
            assert p == pytest.approx(expected, abs=1e-9) and ess == pytest.approx(target * len(x))
        assert 0 < out.p_N.min() < 1

    def test_its_parameters_are_checked(self, values):
        for parameters, field, words in (
            ({"floor": 1.0}, "rule_parameters.floor", "below 1"),
            ({"floor": "high"}, "rule_parameters.floor", "expected float"),
            ({"flor": 0.5}, "rule_parameters.flor", "did you mean 'floor'"),
        ):
            with pytest.raises(ConfigError, match=words) as caught:
                build(ObjectiveConfig, values | {"rule_parameters": parameters})
            assert caught.value.field == field
        with pytest.raises(ConfigError, match="ess_target: has no effect with rule 'my_rules:Quadratic'; it belongs to ess"):
            build(ObjectiveConfig, values | {"ess_target": 0.9})
        with pytest.raises(ConfigError, match="clips no token"):
            build(ObjectiveConfig, values | {"clip_level": "sequence"})

    def test_a_run_records_it_and_reads_it_again(self, values):
        config = build(ObjectiveConfig, values)
        assert build(ObjectiveConfig, yaml.safe_load(yaml.safe_dump(to_plain(config)))) == config


def cited_headings(text):
    """(page, heading) of every citation such as docs/objective.md, "The formulas", also where it is broken over lines."""
    return re.findall(r'(docs/\w+\.md),\s+(?:#\s*)?"([^"]+)"', text)


def test_headings_that_code_and_tools_cite_exist():
    sources = [*(ROOT / "pmpo_megatron").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    cited = {(source, *citation) for source in sources for citation in cited_headings(source.read_text())}
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
