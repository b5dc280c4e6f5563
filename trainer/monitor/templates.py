"""Read the templates of pages, which all have the same style."""

from pathlib import Path
from string import Template

_STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8").rstrip()


def template(path: Path) -> Template:
    """Read a page with placeholders such as $title, and put the common style in place of $style."""
    return Template(path.read_text(encoding="utf-8").replace("$style", _STYLE))
