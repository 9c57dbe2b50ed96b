"""The files of a diagnosis: JSON and SARIF follow their schemas, and the page says what was measured, with names as text."""

import json
import os
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.diagnostics.formats import SCHEMA
from tests.sick_models import GALLERY, images, lagging, network, trained

ROOT = Path(__file__).parent.parent
OURS = json.loads(resources.files("batchnorm.diagnostics").joinpath("diagnosis.schema.json").read_text())
SARIF = json.loads((ROOT / "tests" / "sarif.schema.json").read_text())
NAME = "<script>alert(1)</script>"


def errors(schema: dict, data) -> list[str]:
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    return [f"{each.json_path}: {each.message}" for each in validator(schema).iter_errors(data)]


@pytest.fixture(scope="module")
def diagnosis():
    """A lagging layer and one with another fault, inside a module with a hostile name."""
    inner = lagging().model
    inner[1].momentum = 0.9
    loss = nn.CrossEntropyLoss()
    return bn.diagnose(
        nn.ModuleDict({NAME: inner}),
        images(),
        forward=lambda _, item: inner(item[0]),
        objective=lambda _, item: loss(inner(item[0]), item[1]),
    )


def written(diagnosis, method: str, folder: Path) -> str:
    path = folder / "file"
    getattr(diagnosis, method)(path)
    return path.read_text()


class TestJson:
    @pytest.mark.parametrize("code", GALLERY)
    def test_every_finding_follows_the_schema(self, code, tmp_path):
        patient = GALLERY[code].sick()
        data = json.loads(written(bn.diagnose(patient.model, **patient.arguments), "to_json", tmp_path))
        assert errors(OURS, data) == []

    def test_layers_have_what_was_measured(self, diagnosis, tmp_path):
        data = json.loads(written(diagnosis, "to_json", tmp_path))
        row = data["layers"][f"{NAME}.4"]
        assert row.keys() == OURS["$defs"]["layer"]["properties"].keys()
        assert row["drift"] == diagnosis.findings[0].evidence["drift"]
        assert row["drift_in_inference"] == pytest.approx(row["drift"], rel=0.05)
        assert (row["order"], row["channels"], len(row["quantiles"])) == (1, 8, 5)
        worst = row["quantiles"][-1]
        assert worst["running_mean"] - worst["mean"] == pytest.approx(2 * worst["running_deviation"], rel=0.1)
        assert row["gradient"] > 0

    def test_a_gradient_whose_square_vanishes_in_float32_has_a_norm(self):
        model, loss = trained(), nn.CrossEntropyLoss()
        layers = bn.diagnose(model, images(), criterion=lambda output, target: 1e-30 * loss(output, target)).layers
        assert all(0 < row["gradient"] < 1e-28 for row in layers.values())

    def test_drift_in_inference_has_that_of_the_layers_before(self):
        model = trained()
        model[1].running_mean += 2 * model[1].running_var.sqrt()
        layers = bn.diagnose(model, images()).layers
        assert layers["4"]["drift"] < 0.01
        assert layers["4"]["drift_in_inference"] > 0.1

    def test_a_model_that_fails_in_inference_has_no_such_drift(self):
        def forward(model, item):
            assert model.training
            return model(item[0])

        layers = bn.diagnose(trained(), images(), forward=forward).layers
        assert layers["4"]["drift"] is not None
        assert layers["4"]["drift_in_inference"] is None

    def test_static_layers_have_no_measurements(self, tmp_path):
        data = json.loads(written(bn.diagnose(network()), "to_json", tmp_path))
        assert errors(OURS, data) == []
        assert data["layers"]["1"].keys() == set(OURS["$defs"]["layer"]["required"])

    def test_the_schema_refuses_other_data(self, diagnosis):
        data = diagnosis.to_data()
        assert OURS["properties"]["schema"]["const"] == data["schema"] == SCHEMA
        for change in ({"schema": SCHEMA + 1}, {"extra": 1}, {"findings": [{}]}, {"layers": {"1": {"kind": "ours"}}}):
            assert errors(OURS, data | change)

    def test_every_field_is_documented(self):
        text = (ROOT / "docs" / "diagnose.md").read_text()
        parts = [OURS, *(OURS["$defs"][name] for name in ("finding", "layer"))]
        parts.append(OURS["$defs"]["layer"]["properties"]["quantiles"]["items"])
        for name in (name for part in parts for name in part["properties"]):
            assert f"`{name}`" in text, name


@pytest.fixture(scope="module")
def schemas():
    """Ours, and the official one if SARIF_SCHEMA names its file, whose license does not allow a copy in this repository."""
    official = os.environ.get("SARIF_SCHEMA")
    return [SARIF, *([json.loads(Path(official).read_text())] if official else [])]


class TestSarif:
    @pytest.mark.parametrize("code", GALLERY)
    def test_every_finding_follows_the_schema(self, code, schemas, tmp_path):
        patient = GALLERY[code].sick()
        data = json.loads(written(bn.diagnose(patient.model, **patient.arguments), "to_sarif", tmp_path))
        for schema in schemas:
            assert errors(schema, data) == []

    def test_the_schema_refuses_other_data(self, diagnosis, tmp_path):
        data = json.loads(written(diagnosis, "to_sarif", tmp_path))
        run = data["runs"][0]
        for change in ({"version": "2.0.0"}, {"runs": [{}]}, {"runs": [run | {"results": [{"level": "fatal"}]}]}):
            assert errors(SARIF, data | change)


class Text(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements, self.text = list[tuple[str, dict]](), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(diagnosis, tmp_path_factory):
    return written(diagnosis, "to_html", tmp_path_factory.mktemp("page"))


class TestPage:
    def test_names_are_text(self, page):
        assert "<script>alert" not in page
        assert f"{NAME}.4" in Text(page).text

    def test_findings_come_first_worst_first(self, page):
        found = [attrs["data-severity"] for tag, attrs in Text(page).elements if tag == "article"]
        assert found == ["error", "warning"]
        assert page.index("<article") < page.index("<figure") < page.index("<table")

    def test_it_needs_nothing_but_itself(self, page, diagnosis):
        targets = {attrs[key] for _, attrs in Text(page).elements for key in ("src", "href") if key in attrs}
        loaded = {each for each in targets if not each.startswith(("#", "data:"))}
        assert loaded == {link for each in diagnosis.findings for link in (each.url, each.learn)}  # which load nothing

    def test_charts_have_their_values_for_the_script(self, page, diagnosis):
        charts = [json.loads(each) for each in re.findall(r'<script type="application/json">(.*?)</script>', page)]
        assert [each["title"] for each in charts] == ["Drift", "Effective samples", "Gradient"]
        assert charts[0]["x"]["names"] == [f"1: {NAME}.1", f"2: {NAME}.4"]
        drift = diagnosis.layers[f"{NAME}.4"]["drift"]
        assert charts[0]["series"][0]["points"][1] == [1, float(f"{drift:.4g}")]

    def test_pictures_say_what_they_show(self, page, diagnosis):
        worst = diagnosis.layers[f"{NAME}.4"]["quantiles"][-1]
        said = f"channel {worst['channel']}: batches {worst['mean']:.3g} ± {worst['deviation']:.3g}, running "
        assert said in page

    def test_values_that_cannot_be_drawn_are_left_out(self, tmp_path):
        model = trained()
        model[4].running_var[0] = float("nan")
        page = written(bn.diagnose(model, images(), criterion=nn.CrossEntropyLoss()), "to_html", tmp_path)
        assert "NaN" not in re.findall(r'<script type="application/json">(.*?)</script>', page)[0]
        assert page.count('<svg role="img" viewBox="-5.5') == 1  # of the other layer

    def test_models_without_batch_norm_or_data_have_a_page_too(self, tmp_path):
        for model in (nn.Linear(2, 2), network()):
            page = written(bn.diagnose(model), "to_html", tmp_path)
            assert "Nothing found." in page
            assert "<figure" not in page

    def test_one_layer_and_one_channel(self, tmp_path):
        model = nn.BatchNorm1d(1)
        page = written(bn.diagnose(model, [torch.randn(32, 1) for _ in range(3)]), "to_html", tmp_path)
        assert "the model" in page
