"""The frontier of a mixed-precision search as one page: the curve, the choice, and what each group got."""

from collections import Counter
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fourfold.core.durable import write_file, writing
from fourfold.core.records import FormatGroup, Frontier
from fourfold.report.charts import embed
from fourfold.report.digits import size
from fourfold.report.environment import asset, page_environment


def write_frontier(record: Frontier, page: Path) -> None:
    """Write ``record`` as one HTML file that needs no network.

    Raises FourfoldError when it cannot be written.
    """
    html = (
        page_environment()
        .get_template("frontier.html")
        .render(
            record=record,
            formats=formats_of(record),
            taken=[f for f in formats_of(record) if f in record.points[record.chosen].groups],
            rows=table(record),
            data=Markup(embed(frontier_data(record))),
            script=Markup(asset("frontier.js")),
        )
    )
    with writing(page):
        write_file(page, html)


def formats_of(record: Frontier) -> list[str]:
    """Every format that some point uses, the smallest first, as groups list them."""
    used = {form for point in record.points for form in point.groups}
    groups = sorted(record.groups, key=lambda group: -len(group.predicted_kl))
    return list(dict.fromkeys(f for g in groups for f in g.predicted_kl if f in used))


def frontier_data(record: Frontier) -> dict[str, Any]:
    """What the chart draws: points in order, and the share of groups in each format."""
    return {
        "points": [
            {"bits": p.bits, "size": size(p.size_bytes), "kl": p.predicted_kl, "groups": p.groups}
            for p in record.points
        ],
        "formats": formats_of(record),
        "chosen": record.chosen,
    }


def table(record: Frontier) -> list[dict[str, Any]]:
    """Groups whose names differ only in the layer, with how many layers got each format."""
    kinds: dict[str, list[FormatGroup]] = {}
    for group in record.groups:
        kinds.setdefault(kind(group), []).append(group)
    return [
        {
            "kind": name,
            "formats": Counter(group.format for group in groups),
            "kl": sum(group.predicted_kl[group.format] for group in groups),
        }
        for name, groups in kinds.items()
    ]


def kind(group: FormatGroup) -> str:
    """``self_attn.q_proj + k_proj + v_proj``; of experts, their owner."""
    module = group.modules[0]
    if ".experts." in module:
        return f"{'.'.join(module.split('.experts.')[0].split('.')[-1:])}.experts"
    owner = ".".join(part for part in module.split(".")[-2:-1] if not part.isdigit())
    leaves = " + ".join(name.rpartition(".")[2] for name in group.modules)
    return f"{owner}.{leaves}" if owner else leaves
