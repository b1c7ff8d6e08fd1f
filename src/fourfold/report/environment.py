"""What all pages have in common: their templates' settings, filters and shipped assets."""

from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fourfold import __version__
from fourfold.report import digits

FILTERS = ("figure", "ratio", "percent", "change", "size", "memory", "count")


def page_environment() -> Environment:
    """Templates that escape what comes from records; ``head.html`` and every page know version and assets."""
    environment = Environment(
        loader=PackageLoader("fourfold.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(digits, name) for name in FILTERS}
    environment.globals |= {
        "version": __version__,
        "style": Markup(asset("style.css")),
        "echarts": Markup(asset("echarts.min.js")),
    }
    return environment


def asset(name: str) -> str:
    """A file shipped with the package, to be put into a page."""
    return (files("fourfold.report") / "assets" / name).read_text(encoding="utf-8")
