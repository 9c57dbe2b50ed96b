"""The page of `batchnorm learn`: how it is assembled, its strings, and its mathematics, run here under node as in the page."""

import json
import random
import re
import shutil
import string
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import batchnorm as bn
from batchnorm import learn, reference
from batchnorm.cli import commands
from batchnorm.diagnostics import RULES
from batchnorm.diagnostics.finding import Finding
from batchnorm.learn import page
from tests.test_docs import anchors, script

ROOT = Path(learn.__file__).parent
SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.rglob("*.mjs"))}
RUNNER = Path(__file__).parent / "learn.mjs"
TOLERANCE = 1e-9
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="the page's modules run under node")


def call(*calls: tuple) -> list:
    """The results of (module, function, arguments...) under node."""
    asked = {"root": str(ROOT), "calls": [[module, name, list(given)] for module, name, *given in calls]}
    done = subprocess.run([NODE, RUNNER], input=json.dumps(asked), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def close(ours, theirs) -> bool:
    """Whether numbers agree to 1e-9 of the largest of them."""
    ours, theirs = torch.as_tensor(ours, dtype=torch.float64), torch.as_tensor(theirs, dtype=torch.float64)
    return bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max().clamp(min=1))


class TestAssembly:
    @pytest.mark.parametrize("language", page.LANGUAGES)
    def test_the_page_is_one_small_file_that_asks_for_nothing(self, language):
        text = page.render(language)
        assert len(text.encode()) < 500_000
        assert re.findall(r'(?:src|href)="?(?!data:)[^"]', text.split("<script")[0]) == []
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.script())
        assert not re.search(r"\bfetch\(|XMLHttpRequest|\bimport\(|WebSocket|@import|url\((?!#)", text)
        assert "default-src 'none'" in text
        assert "{{" not in text.split("<script>")[0]

    def test_the_policy_allows_the_script_of_the_page(self):
        from base64 import b64encode
        from hashlib import sha256

        text = page.render()
        script = re.search(r"<script>(.*)</script>", text, re.DOTALL)
        assert f"'sha256-{b64encode(sha256(script[1].encode()).digest()).decode()}'" in text

    def test_every_module_is_in_the_script_after_those_it_imports(self):
        script = page.script()
        places = {name: script.find(f'modules["{name}"] = ') for name in SOURCES}
        assert min(places.values()) >= 0
        used = re.findall(r'const \{ ([^}]*) \} = modules\["([^"]+)"\];', script)
        assert used
        for names, name in used:
            exported = re.search(r"return \{ (.*) \};\n\}\)\(\);", script[places[name] :])[1].split(", ")
            assert {each.split(":")[0] for each in names.split(", ")} <= set(exported)
        for match in re.finditer(r'= modules\["([^"]+)"\];', script):
            assert places[match[1]] < match.start()

    def test_no_import_or_export_is_left(self):
        assert not re.search(r"^(import|export)\b", page.script(), re.MULTILINE)

    @needs_node
    def test_the_script_is_valid(self, tmp_path):
        (tmp_path / "script.js").write_text(page.script())
        done = subprocess.run([NODE, "--check", tmp_path / "script.js"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("language", page.LANGUAGES)
    def test_without_a_script_it_says_what_each_panel_teaches(self, language):
        table = page.strings(language)
        static = re.search(r"<noscript>(.*)</noscript>", page.render(language), re.DOTALL)[1]
        for panel in page.panels():
            assert table[panel]["title"] in static
        assert "`" not in static

    def test_every_panel_has_a_file_and_strings(self):
        files = {Path(name).stem for name in SOURCES if name.startswith("panels/")} - {"index"}
        assert sorted(page.panels()) == sorted(files)
        assert set(page.strings("en")) == files | {"frame"}

    def test_every_finding_of_diagnose_leads_to_a_panel(self):
        assert set(page.findings().values()) <= set(page.panels())
        for rule in RULES:
            assert page.panel_of(rule.code) in page.panels()
        for code in page.findings():
            assert any(rule.code.startswith(code) for rule in RULES), f"no rule begins with {code}"


def literal_keys(source: str) -> tuple[set[str], set[str]]:
    """Keys that a module asks for, as t("key") and frame("key"), and patterns of those that it composes, as t(`key.${name}`)."""
    keys, patterns = set[str](), set[str]()
    for argument in re.findall(r"\b(?:t|frame)\(((?:`[^`]*`|\"[^\"]*\"|[^,()`\"])*)", source):
        literals = re.sub(r'=== "[^"]*"', "", argument)
        keys |= set(re.findall(r'"([^"]*)"', literals))
        for template in re.findall(r"`([^`]*)`", argument):
            patterns.add(r"[\w-]+".join(map(re.escape, re.split(r"\$\{(?:[^{}]|\{[^}]*\})*\}", template))))
    return keys, patterns


@pytest.fixture(scope="module")
def declared() -> dict[str, set[str]]:
    """The keys that the frame asks for each panel: for its text, its questions and its controls."""
    if NODE is None:
        pytest.skip("the page's modules run under node")
    (panels,) = call(("panels/index.mjs", "PANELS"))
    keys = {}
    for panel in panels:
        mine = {"where", "title", "intro", "see", "keep"}
        for kind in ("guess", "check"):
            options = [option for option in panel[kind]["options"] if option != "unsure"]
            assert panel[kind]["answer"] in options
            mine |= {kind, f"{kind}.because", *(f"{kind}.{option}" for option in options)}
        for control in panel["controls"]:
            mine |= {control["name"]} if control["kind"] != "diagnosis" else set()
            mine |= {f"{control['name']}.{option}" for option in control.get("options", [])}
            mine |= {f"{control['name']}.stop"} if control["kind"] == "play" else set()
        keys[panel["id"]] = mine
    return keys


class TestStrings:
    def test_both_languages_have_the_same_keys_and_placeholders(self):
        english, chinese = map(page.strings, ("en", "zh"))
        assert english.keys() == chinese.keys()

        def places(text: str) -> set[str]:
            return {name for _, name, _, _ in string.Formatter().parse(text) if name}

        for part, table in english.items():
            assert list(table) == list(chinese[part]), part
            for key, text in table.items():
                assert places(text) == places(chinese[part][key]), f"{part}: {key}"
                assert text.count("`") == chinese[part][key].count("`"), f"{part}: {key}"

    def test_chinese_has_chinese_punctuation(self):
        for part, table in page.strings("zh").items():
            for key, text in table.items():
                assert not re.search(r"[\u4e00-\u9fff][,:;?!]|[,:;?!] ?[\u4e00-\u9fff]", text), f"{part}: {key}: {text}"

    def test_none_is_missing(self, declared):
        for panel, keys in declared.items():
            table = page.strings("en")[panel]
            asked, patterns = literal_keys(SOURCES[f"panels/{panel}.mjs"])
            assert keys | asked <= table.keys(), panel
            for pattern in patterns:
                assert any(re.fullmatch(pattern, key) for key in table), f"{panel}: {pattern}"

    def test_none_is_unused(self, declared):
        found = [literal_keys(source) for source in SOURCES.values()]
        keys = set().union(*(keys for keys, _ in found)) | {"guess", "check", "language", "theme", "lang", "noscript"}
        patterns = set().union(*(patterns for _, patterns in found))
        for part, table in page.strings("en").items():
            for key in table.keys() - declared.get(part, set()) - keys:
                assert any(re.fullmatch(pattern, key) for pattern in patterns), f"{part}: {key}"

    def test_keys_are_found_in_sources(self):
        source = 't("a"); t(x === "no" ? "b" : "c.d", { v: 1 }); frame(`e.${f({ a: 1 })}.g`); t(h); make("i"); t("j", { k: t(`l.${m}`) })'
        assert literal_keys(source) == ({"a", "b", "c.d", "j"}, {r"e\.[\w-]+\.g", r"l\.[\w-]+"})


@pytest.fixture(scope="module")
def batches() -> list[dict]:
    """A hundred random mini-batches with their layers: sizes, scales and offsets over several orders."""
    draw = random.Random(20)
    found = []
    for _ in range(100):
        m, scale, offset = draw.randint(2, 40), 10 ** draw.uniform(-2, 2), draw.gauss(0, 3)
        found.append(
            {
                "x": [offset + scale * draw.gauss(0, 1) for _ in range(m)],
                "dy": [draw.gauss(0, 1) for _ in range(m)],
                "gamma": draw.gauss(0, 1),
                "beta": draw.gauss(0, 1),
                "eps": 10 ** draw.uniform(-6, -1),
                "momentum": draw.uniform(0.01, 0.9),
            }
        )
    return found


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]  # (m,) -> (N, C)


@needs_node
class TestMathematics:
    def test_the_forward_is_that_of_explain_and_of_the_reference(self, batches):
        found = call(*(("mathematics.mjs", "forward", b["x"], b["gamma"], b["beta"], b["eps"]) for b in batches))
        for ours, b in zip(found, batches, strict=True):
            explained = bn.explain(b["x"], b["gamma"], b["beta"], b["eps"])
            for name in ("mean", "deviations", "variance", "std", "normalized", "output"):
                assert close(ours[name], getattr(explained, name)), name
            gamma, beta = (torch.tensor([b[name]], dtype=torch.float64) for name in ("gamma", "beta"))
            theirs = reference.forward(column(b["x"]), gamma, beta, b["eps"])
            assert close(ours["output"], theirs.y[:, 0])
            assert close(ours["normalized"], theirs.xhat[:, 0])

    def test_the_backward_is_that_of_explain_and_of_autograd(self, batches):
        found = call(*(("mathematics.mjs", "backward", b["x"], b["dy"], b["gamma"], b["eps"]) for b in batches))
        for ours, b in zip(found, batches, strict=True):
            explained = bn.explain(b["x"], b["gamma"], b["beta"], b["eps"], grad_output=b["dy"])
            assert close(ours["direct"], explained.grad_through_normalized)
            assert close(ours["throughVariance"], explained.grad_through_variance)
            assert close(ours["throughMean"], [explained.grad_through_mean] * len(b["x"]))
            assert close(ours["input"], explained.grad_input)
            x, gamma = column(b["x"]).requires_grad_(), torch.tensor(b["gamma"], dtype=torch.float64).requires_grad_()
            y = gamma * (x - x.mean()) / (x.var(correction=0) + b["eps"]).sqrt()
            y.backward(column(b["dy"]))
            assert close(ours["input"], x.grad[:, 0])
            assert close([ours["gamma"], ours["beta"]], [gamma.grad, sum(b["dy"])])

    def test_finite_differences_come_near_without_the_formulas(self, batches):
        tame = [b for b in batches if 0.1 < torch.tensor(b["x"]).std() < 10]
        assert len(tame) > 20
        found = call(
            *(("mathematics.mjs", "finiteDifferences", b["x"], b["dy"], b["gamma"], b["eps"]) for b in tame),
            *(("mathematics.mjs", "backward", b["x"], b["dy"], b["gamma"], b["eps"]) for b in tame),
        )
        for numerical, exact in zip(found[: len(tame)], found[len(tame) :], strict=True):
            torch.testing.assert_close(torch.tensor(numerical), torch.tensor(exact["input"]), rtol=1e-5, atol=1e-5)

    def test_running_statistics_and_inference_are_those_of_the_reference(self, batches):
        start = {"mean": 0.3, "variance": 1.7}
        for unbiased in (True, False):
            found = call(*(("mathematics.mjs", "running", start, b["x"], b["momentum"], unbiased) for b in batches))
            for ours, b in zip(found, batches, strict=True):
                mean, variance = torch.tensor([0.3]).double(), torch.tensor([1.7]).double()
                mean[0], variance[0] = start["mean"], start["variance"]
                theirs = reference.running(mean, variance, column(b["x"]), b["momentum"], unbiased=unbiased)
                assert close([ours["mean"], ours["variance"]], torch.cat(theirs))
        found = call(
            *(("mathematics.mjs", "inference", b["x"], 0.3, 1.7, b["gamma"], b["beta"], b["eps"]) for b in batches)
        )
        for ours, b in zip(found, batches, strict=True):
            numbers = (torch.tensor([value], dtype=torch.float64) for value in (0.3, 1.7, b["gamma"], b["beta"]))
            assert close(ours, reference.inference(column(b["x"]), *numbers, b["eps"])[:, 0])

    def test_gamma_and_beta_learn_the_identity(self, batches):
        (path,) = call(("panels/undo.mjs", "descent", [1.0, 2.0, 4.0, 7.0], -1.0, 0.0, 400))
        explained = bn.explain([1.0, 2.0, 4.0, 7.0])
        assert path[-1] == pytest.approx([explained.std, explained.mean], rel=1e-9)

    def test_a_mini_batch_of_one_gives_beta_and_noise_falls_with_its_size(self):
        alone, four, sixteen, sixty_four = call(*(("panels/neighbors.mjs", "redraws", 1, m) for m in (1, 4, 16, 64)))
        assert set(alone) == {0}
        four, sixteen, sixty_four = (torch.tensor(each).std().item() for each in (four, sixteen, sixty_four))
        assert four > sixteen > sixty_four
        assert sixteen / sixty_four == pytest.approx(2, rel=0.25)

    def test_paths_alone_are_not_the_gradient(self):
        every = {"direct": True, "variance": True, "mean": True}
        rest = {"upstream": "first", "x1": 0.8, "scale": 1, "gamma": 1}
        whole, without = call(
            ("panels/paths.mjs", "gradients", {**every, **rest}),
            ("panels/paths.mjs", "gradients", {**every, **rest, "variance": False}),
        )
        assert close(whole["chosen"], bn.explain([0.8, 1.2, 0.9, 1.1]).grad_input)
        assert whole["error"] < 1e-12
        assert without["error"] > 1

    @pytest.mark.parametrize("convention", ["torch", "keras"])
    def test_training_moves_running_statistics_as_the_layer_does(self, convention):
        state = {"momentum": 0.2, "convention": convention, "m": 8, "step": 30, "shift": 1.5}
        trained, tested = call(("running.mjs", "training", state), ("running.mjs", "testing", state))
        weight = 0.2 if convention == "torch" else 0.8
        mean, variance = 0.0, 1.0
        for batch, after in zip(trained["batches"], trained["path"][1:], strict=True):
            mean = (1 - weight) * mean + weight * batch["mean"]
            variance = (1 - weight) * variance + weight * batch["variance"]
            assert close([after["mean"], after["variance"]], [mean, variance])
        statistics, values = tested["statistics"], column(tested["values"])
        assert statistics == trained["path"][30]
        both = (torch.tensor([statistics[name]], dtype=torch.float64) for name in ("mean", "variance"))
        evaluated, inside = reference.inference(values, *both), reference.forward(values).y
        assert close(tested["evaluated"], evaluated[:, 0])
        assert close(tested["trained"], inside[:, 0])
        assert tested["gap"] == pytest.approx((evaluated - inside).abs().mean().item(), rel=1e-9)

    def test_drift_is_that_of_diagnose(self):
        from batchnorm.diagnostics.record import divergence

        (ours,) = call(
            ("running.mjs", "drift", {"mean": 0.5, "variance": 3.0}, {"mean": 1.0, "variance": 2.0}),
        )
        theirs = divergence(*(torch.tensor([v], dtype=torch.float64) for v in (1.0, 2.0, 0.5, 3.0)), 0.0)
        assert ours == pytest.approx(theirs.item(), rel=1e-12)

    @pytest.mark.parametrize("kind", ["batch", "layer", "instance", "group"])
    def test_cells_share_statistics_as_torchs_layers_do(self, kind):
        N, C, H, W = 2, 4, 2, 3
        x = torch.randn(N, C, H, W, dtype=torch.float64, requires_grad=True)
        apply = {
            "batch": torch.nn.BatchNorm2d(C),
            "layer": torch.nn.LayerNorm([C, H, W]),
            "instance": torch.nn.InstanceNorm2d(C),
            "group": torch.nn.GroupNorm(2, C),
        }[kind].double()
        state = {"kind": kind, "N": N, "C": C, "H": H, "W": W, "groups": 2}
        here = {"n": 1, "c": 2, "h": 0, "w": 1}
        apply(x)[1, 2, 0, 1].backward()  # its gradient reaches the values that share its statistics
        cells = [
            dict(zip("nchw", index, strict=True))
            for index in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist()
        ]
        together = call(*(("panels/axes.mjs", "together", state, cell, here) for cell in cells))
        assert together == (x.grad != 0).flatten().tolist()


@needs_node
class TestStateAndFiles:
    def test_the_address_holds_the_values(self):
        from_link = "#panel=modes&lang=zh&theme=dark&modes.momentum=0.3&modes.forget=1&modes.convention=keras&undo.guess=identity"
        (again,) = round_trip(from_link)
        assert sorted(again.split("&")) == sorted(from_link[1:].split("&"))

    def test_what_an_address_holds_beyond_the_range_or_unknown_is_ignored(self):
        odd = "#panel=none&lang=xx&modes.momentum=99&modes.forget=maybe&modes.convention=jax&undo.guess=no&gone.x=1&numbers.x1=abc"
        assert round_trip(odd) == ["modes.momentum=0.9"]
        assert round_trip("") == [""]

    def test_a_diagnosis_is_read(self, tmp_path):
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
        diagnosis = bn.diagnose(model, [(torch.randn(16, 3), torch.zeros(16)) for _ in range(2)])
        assert diagnosis.findings
        diagnosis.to_json(tmp_path / "diagnosis.json")
        (read,) = call(("diagnosis.mjs", "readDiagnosis", (tmp_path / "diagnosis.json").read_text()))
        assert [each["code"] for each in read["diagnosis"]["findings"]] == [each.code for each in diagnosis.findings]
        assert read["diagnosis"]["layers"].keys() == diagnosis.layers.keys()

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("not json", "not-json"),
            ("[]", "not-diagnosis"),
            ('{"a": 1}', "not-diagnosis"),
            ('{"schema": 1, "findings": [1], "layers": {}}', "not-diagnosis"),
            ('{"schema": 1, "findings": [], "layers": {"a": 1}}', "not-diagnosis"),
            ('{"schema": 2, "findings": [], "layers": {}}', "other-schema"),
        ],
    )
    def test_other_files_are_named_as_such(self, text, problem):
        assert call(("diagnosis.mjs", "readDiagnosis", text)) == [{"problem": problem}]
        assert f"diagnosis.{problem}" in page.strings("en")["frame"]

    def test_both_sides_read_the_table_of_findings_alike(self):
        found = call(*(("diagnosis.mjs", "panelOf", rule.code, page.findings()) for rule in RULES))
        assert found == [page.panel_of(rule.code) for rule in RULES]


def round_trip(fragment: str) -> list[str]:
    """The fragment as the page writes it again."""
    program = (
        f"import {{ decode, encode }} from {json.dumps((ROOT / 'state.mjs').as_uri())};"
        f"import {{ PANELS }} from {json.dumps((ROOT / 'panels/index.mjs').as_uri())};"
        f"console.log(encode(decode({json.dumps(fragment)}, PANELS), PANELS));"
    )
    done = subprocess.run([NODE, "--input-type=module", "-e", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [done.stdout.strip()]


class TestCommand:
    @pytest.fixture(autouse=True)
    def elsewhere(self, monkeypatch, tmp_path):
        for name in ("BATCHNORM_LANG", "LC_ALL", "LANG"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)
        self.opened = []
        monkeypatch.setattr("webbrowser.open", lambda address: self.opened.append(address) or True)

    def run(self, *arguments: str):
        return CliRunner().invoke(commands, ["learn", *arguments])

    def test_it_writes_the_page_and_opens_it(self, tmp_path):
        for _ in range(2):  # again: what it writes by itself is nobody's work
            result = self.run()
            assert (result.exit_code, result.stdout) == (0, "Wrote runs/learn/learn.html.\n")
        written = tmp_path / "runs" / "learn" / "learn.html"
        assert written.read_text(encoding="utf-8") == page.render("en")
        assert self.opened == [written.as_uri()] * 2

    def test_it_opens_at_a_panel(self):
        assert self.run("--panel", "modes").exit_code == 0
        assert self.opened[0].endswith("/learn.html#panel=modes")
        assert "'gone' is not one of" in self.run("--panel", "gone").stderr

    def test_without_a_browser_it_says_so(self, monkeypatch):
        monkeypatch.setattr("webbrowser.open", lambda address: False)
        result = self.run()
        assert result.exit_code == 0
        assert "No browser was found" in result.stdout

    def test_a_file_of_yours_is_not_overwritten(self, tmp_path):
        (tmp_path / "mine.html").write_text("mine")
        result = self.run("--no-open", "--out", "mine.html")
        assert result.exit_code == 2
        assert "--force" in result.stderr
        assert (tmp_path / "mine.html").read_text() == "mine"
        assert self.run("--no-open", "--out", "mine.html", "--force").exit_code == 0
        assert (tmp_path / "mine.html").read_text(encoding="utf-8").startswith("<!doctype html>")
        assert self.opened == []

    @pytest.mark.parametrize(
        ("environment", "language"),
        [
            ({}, "en"),
            ({"LANG": "zh_CN.UTF-8"}, "zh"),
            ({"LANG": "de_DE.UTF-8"}, "en"),
            ({"BATCHNORM_LANG": "zh", "LANG": "en_US.UTF-8"}, "zh"),
            ({"BATCHNORM_LANG": "en", "LC_ALL": "zh_CN.UTF-8"}, "en"),
        ],
    )
    def test_the_language_is_the_readers(self, monkeypatch, tmp_path, environment, language):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert self.run("--no-open").exit_code == 0
        assert f'data-language="{language}"' in (tmp_path / "runs/learn/learn.html").read_text(encoding="utf-8")
        assert self.run("--no-open", "--lang", "zh").exit_code == 0
        assert 'data-language="zh"' in (tmp_path / "runs/learn/learn.html").read_text(encoding="utf-8")


class TestDocumentation:
    def test_the_pages_have_the_panels_as_they_are(self):
        """Make them again with: python scripts/learn_page.py"""
        module = script("scripts/learn_page.py")
        for language, path in module.PAGES.items():
            assert path.read_text() == module.page(path.read_text(), language)

    def test_each_finding_links_to_the_section_on_its_panel(self):
        known = anchors(Path(__file__).parent.parent / "docs" / "learn.md")
        for rule in RULES:
            finding = Finding(rule.code, "note", (), {}, "", "", "", rule.url)
            assert finding.learn.partition("#")[2] in known
