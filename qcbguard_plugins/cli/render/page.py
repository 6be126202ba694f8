"""Pages from templates: everything is escaped but what the package itself draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from qcbguard_plugins.errors import MissingDependencyError


def render_page(template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """Fill a template of ``cli/render/templates``.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError(
            "HTML reports need jinja2", remedy="pip install 'qcbguard-plugins[scan]'"
        ) from error
    folder = resources.files("qcbguard_plugins").joinpath("cli/render/templates")
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(".j2")]
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({name: folder.joinpath(name).read_text(encoding="utf-8") for name in names}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(template).render(**values)
