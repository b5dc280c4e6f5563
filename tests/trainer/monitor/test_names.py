"""Names of classes in tables and pictures: short, different from each other, and in letters that exist."""

import pytest
from markdown_it import MarkdownIt

from pipeline.manifest import Class
from trainer.monitor.drawn_names import drawn_names
from trainer.monitor.names import as_markdown, plain_names, shorten


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("tench", "tench"),
        ("exactly twelv", "exactly…"),
        ("exactly 12 c", "exactly 12 c"),
        ("tench, Tinca tinca", "tench"),
        ("kite (a, b)", "kite (a, b)"),
        ("crane (a machine)", "crane…"),
        ("kite (a) of China", "kite (a) of…"),
        ("kite [bird of prey], hawk", "kite…"),
        ("two\n lines", "two lines"),
        ("electrocardiograph", "electrocard…"),
        ("a:) lonely smiley", "a:) lonely…"),
        ("", ""),
    ],
)
def test_a_long_name_is_cut_between_words_and_never_inside_brackets(name, shown):
    assert shorten(name, 12) == shown


def test_names_that_would_be_alike_have_their_labels():
    names = ["crane (bird of the wetlands)", "crane", "crane (machine)", "cat", "crane (bird, large)"]
    classes = [Class(id=f"n{label}", name=name) for label, name in enumerate(names)]
    assert plain_names(classes, 15) == ["0 crane…", "crane", "crane (machine)", "cat", "4 crane…"]


def test_a_name_that_cannot_be_drawn_is_replaced_by_the_id_and_an_id_by_the_label():
    classes = [
        Class(id=id_, name=name) for id_, name in [("cat", "猫"), ("犬", "犬"), ("x", "кошка"), ("y", "")]
    ]
    assert drawn_names(classes, 20) == ["cat", "class 1", "кошка", "y"]
    assert plain_names(classes, 20) == ["猫", "犬", "кошка", "y"]


def test_names_are_shown_in_markdown_as_they_are():
    name = "<unk> |\n__a__ *b* `c` ![d](http://e) #f ~g~ \\ & h, i. j-k"
    [paragraph] = MarkdownIt().parseInline(as_markdown(name))
    assert {token.type for token in paragraph.children} <= {"text", "text_special"}
    assert "".join(token.content for token in paragraph.children) == " ".join(name.split())
