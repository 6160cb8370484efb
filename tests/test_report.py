import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from nnsanity import DiagnosisError, Finding, Layer, Report
from nnsanity.quantities.moments import feature_moments

LONG = "the number is large and the sentence about it goes on and on " * 5


def finding(severity, rule, **changes):
    return Finding(rule, 8, severity, "w", 9.0, 1.0, LONG, f"-> {LONG}")._replace(
        **changes
    )


ERROR = finding("error", "gradients/disconnected-parameter")
WARNING = finding("warning", "gradients/vanishing")
NOTE = finding("info", "gradients/exploding")
FULL = Report(
    (NOTE, ERROR, WARNING),
    {
        "moments": feature_moments(jnp.array([[1.0, math.nan]])),
        "layers": (Layer("w", "dense", 3, 4, 4, None),),
        "by step": {1: jnp.ones(2, jnp.bfloat16), 2: np.float64(math.inf)},
        "empty": jnp.zeros(0),
        "flag": np.bool_(1),
        "complex": jnp.complex64(1j),
    },
    {"width": LONG},
    summary="It does not learn. " * 9,
    ruled_out=("another rate", LONG),
)
HEALTHY = Report((), {}, {})
NOTES = Report((NOTE,), {}, {})


def test_the_order_of_the_page():
    page = str(FULL)
    marks = [
        "nnsanity checkup: 1 error, 1 warning\n",
        "It does not learn.",
        "1. ERROR  gradients/disconnected-parameter  (checklist 8: gradients)",
        "2. WARNING  gradients/vanishing",
        "Worth knowing",
        "gradients/exploding: the number",
        "Ruled out: another rate;",
        "Not run or not looked into:",
        "- width: the number",
    ]
    places = [page.find(mark) for mark in marks]
    assert -1 not in places
    assert places == sorted(places)


def test_the_advice_stands_under_the_message():
    block = str(FULL).split("2. WARNING")[0].split("1. ERROR")[1]
    places = [block.find(part) for part in ("at w\n", "the number", "-> ")]
    assert -1 not in places
    assert places == sorted(places)


@pytest.mark.parametrize(
    "report",
    [
        FULL,
        HEALTHY,
        Report((ERROR._replace(where="encoder/block/" * 12),), {}, {}),
        Report((), {}, {f"layer {'encoder/block/' * 12}": "inside of scan"}),
    ],
)
def test_no_line_is_wider_than_a_terminal(report):
    assert max(len(line) for line in str(report).splitlines()) <= 100


def test_nothing_wrong():
    assert str(HEALTHY) == "nnsanity checkup: nothing wrong found"
    assert str(NOTES).startswith("nnsanity checkup: nothing wrong found\n")
    assert "Ruled out" not in str(NOTES)


def test_plurals():
    report = Report((ERROR, ERROR, WARNING, WARNING), {}, {})
    assert "checkup: 2 errors, 2 warnings\n" in str(report)


def test_dictionary_goes_through_json():
    plain = FULL.to_dict()
    again = json.loads(json.dumps(plain, allow_nan=False))
    assert again == plain
    assert list(plain) == [
        "summary",
        "findings",
        "ruled_out",
        "skipped",
        "measurements",
    ]
    assert [set(one) for one in plain["findings"]] == [set(Finding._fields)] * 3
    assert plain["findings"][1]["rule"] == ERROR.rule
    assert plain["findings"][1]["measured"] == 9.0
    assert plain["skipped"] == {"width": LONG}
    assert plain["ruled_out"] == ["another rate", LONG]


def test_values_of_the_dictionary():
    measurements = FULL.to_dict()["measurements"]
    assert measurements["moments"]["count"] == [1, 0]
    assert measurements["moments"]["minimum"] == [1.0, "inf"]
    assert measurements["layers"][0]["name"] == "w"
    assert measurements["layers"][0]["activation"] is None
    assert measurements["by step"] == {"1": [1.0, 1.0], "2": "inf"}
    assert measurements["empty"] == []
    assert measurements["flag"] is True


@pytest.mark.parametrize("value", [math.nan, np.float32(math.nan), -math.inf])
def test_findings_that_are_not_finite(value):
    report = Report((ERROR._replace(measured=value),), {}, {})
    assert report.to_dict()["findings"][0]["measured"] == str(value)


def test_page_is_self_contained(tmp_path):
    path = tmp_path / "report.html"
    page = FULL.to_html(path)
    assert path.read_text(encoding="utf-8") == page
    assert page.startswith("<!doctype html>")
    for reference in ("http:", "https:", "src=", "<link", "<script", "@import"):
        assert reference not in page
    assert FULL._repr_html_() in page
    for text in (ERROR.rule, WARNING.rule, NOTE.rule, "another rate", "width"):
        assert text in page


@pytest.mark.parametrize("field", ["where", "message", "advice", "rule"])
def test_findings_are_escaped(field):
    attack = "<script>a & 'b'"
    for severity in ("error", "info"):
        one = finding(severity, "gradients/blocked")._replace(**{field: attack})
        page = Report((one,), {}, {}).to_html()
        assert "<script>" not in page
    assert (
        "&lt;script&gt;"
        in Report((ERROR._replace(**{field: attack}),), {}, {}).to_html()
    )


def test_the_rest_is_escaped():
    page = Report((), {}, {"<a>": "<b>"}, "<c>", ("<d>",)).to_html()
    assert not any(f"<{name}>" in page for name in "acd")
    assert page.count("<b>") == 0
    assert page.count("&lt;") == 4


@pytest.mark.parametrize(
    ("severity", "expected"),
    [
        ("error", {ERROR}),
        ("warning", {ERROR, WARNING}),
        ("info", {ERROR, WARNING, NOTE}),
    ],
)
def test_raise_for(severity, expected):
    with pytest.raises(DiagnosisError, match=ERROR.rule) as caught:
        FULL.raise_for(severity)
    assert set(caught.value.findings) == expected


def test_raise_for_error_by_default():
    with pytest.raises(DiagnosisError) as caught:
        FULL.raise_for()
    assert caught.value.findings == (ERROR,)


def test_nothing_to_raise_for():
    for severity in ("error", "warning", "info"):
        HEALTHY.raise_for(severity)
    NOTES.raise_for("warning")


@pytest.mark.parametrize("report", [FULL, HEALTHY])
def test_unknown_severity(report):
    with pytest.raises(ValueError, match=r"severity must be one of .* got 'fatal'"):
        report.raise_for("fatal")


@pytest.mark.parametrize("name", ["findings", "summary", "anything"])
def test_frozen(name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(FULL, name, ())
