import re
from pathlib import Path

import nnsanity as ns
from nnsanity.findings import ITEMS

ROOT = Path(ns.__file__).parents[1]
SLUGS = "|".join(name.replace(" ", "-") for name in ITEMS.values())
RULE = re.compile(rf'["`]((?:{SLUGS})/[a-z-]+)["`]')
METRICS = {"gradients/clipped-share", "gradients/noise-share", "gradients/norm"}
COMPOSED = {
    *("initialization/zero", "initialization/symmetric", "batch-size/too-large"),
    *("batch-size/too-small", "normalization/nonfinite-input"),
    *("normalization/nonfinite-target", "gradients/hidden-activation"),
}
"""Rules whose names are put together where they are used."""


def rules_in(*paths):
    return {rule for path in paths for rule in RULE.findall(path.read_text())}


def test_every_rule_is_on_the_page_and_no_other():
    written = rules_in(*sorted((ROOT / "nnsanity").rglob("*.py"))) - METRICS
    assert rules_in(ROOT / "docs" / "rules.md") == written | COMPOSED


def test_names_of_the_page_by_symptom_are_public():
    page = (ROOT / "docs" / "symptoms.md").read_text()
    names = set(re.findall(r"`ns\.([a-z_]+)", page))
    assert names <= set(ns.__all__)
    rules = {*re.findall(rf"`((?:{SLUGS})/[a-z-]+)`", page)}
    assert rules <= rules_in(ROOT / "docs" / "rules.md")
