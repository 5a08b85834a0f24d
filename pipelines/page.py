"""Pages of results: one HTML file each, which opens offline and in years, since all it needs is inside it.

Templates lie in pages/ and extend base.html; values are escaped unless a template marks them as safe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "pages"


def render(template: str, folder: Path = FOLDER, **values: Any) -> str:
    """The page that `template` in `folder` makes of `values`; a value it names and does not get is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, FOLDER]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)
