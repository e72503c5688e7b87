"""Write the report: a page for all papers, a page a paper, and the same as Markdown, JSON and CSV."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from etude.lab.engine import Judgement, judge
from etude.lab.export import write_table
from etude.lab.report.drawing import figure_svg, interval_svg
from etude.lab.results import Results
from etude.lab.rules import Finding
from etude.lab.statistics import Verdict, bootstrap_mean
from etude.lab.store import Store, StoredRun
from etude.lab.study import Study

__all__ = ["build"]

SYMBOLS = {Verdict.REPRODUCED: "✓", Verdict.NOT_REPRODUCED: "✗", Verdict.INCONCLUSIVE: "~"}
CLASSES = {Verdict.REPRODUCED: "yes", Verdict.NOT_REPRODUCED: "no", Verdict.INCONCLUSIVE: "open"}


@dataclass(frozen=True)
class Page:
    """What a paper's page shows.

    Args:
        run: the run it is about: the newest of the highest preset.
        study: the study, if it is still installed.
        judgements: its claims, decided.
        figure: the paper's figure as SVG; empty if it cannot be drawn.
        measurements: rows of arm, coordinates, and intervals of each metric.
    """

    run: StoredRun
    study: Study | None
    judgements: tuple[Judgement, ...]
    figure: Markup
    measurements: "Measurements"

    @property
    def title(self) -> str:
        """The paper's title, or the slug of a study that is no longer installed."""
        return self.study.paper.title if self.study else self.run.study

    @property
    def smoke(self) -> bool:
        """Whether nothing was decided."""
        return self.run.preset == "smoke"

    def verdict(self, finding: Finding) -> str:
        """The verdict in words."""
        return "not judged" if self.smoke else str(finding.verdict)

    def badge(self, finding: Finding) -> Markup:
        """The verdict as a badge that does not rest on colour alone."""
        kind, symbol = ("open", "–") if self.smoke else (CLASSES[finding.verdict], SYMBOLS[finding.verdict])
        return Markup('<span class="badge {}"><span aria-hidden="true">{}</span> {}</span>').format(
            kind, symbol, self.verdict(finding)
        )


@dataclass(frozen=True)
class Measurements:
    """A table of means with their intervals: a row for each arm and coordinate."""

    coordinates: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]


def build(folder: Path, studies: Mapping[str, Study], output: Path | None = None) -> Path:
    """Write the report of a results folder.

    Args:
        folder: the results folder.
        studies: the installed studies, by name.
        output: where to write; ``report`` in the results folder by default.

    Returns:
        The front page's path.
    """
    target = Path(output) if output else Path(folder) / "report"
    with Store(Path(folder)) as store:
        runs = store.runs()
    pages = [_page(run, studies.get(run.study)) for run in _newest(runs)]
    environment = Environment(
        loader=PackageLoader("etude.lab.report"), autoescape=select_autoescape(["html"]), trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals.update(number=_number, interval=_interval, drawing=lambda f: Markup(interval_svg(f)))
    environment.globals["style"] = Markup(environment.get_template("style.css").render())
    target.mkdir(parents=True, exist_ok=True)
    for page in pages:
        _write(target / f"{page.run.study}.html", environment.get_template("paper.html").render(page=page))
        _write(target / "figures" / f"{page.run.study}.svg", _standalone(str(page.figure)))
        write_table([page.run], "csv", target / "records" / f"{page.run.study}.csv")
    counts = Counter(page.verdict(j.finding) for page in pages for j in page.judgements)
    _write(target / "index.html", environment.get_template("index.html").render(pages=pages, counts=counts))
    _write(target / "index.md", environment.get_template("index.md").render(pages=pages, counts=counts))
    _write(target / "verdicts.json", json.dumps(_verdicts(pages), indent=1, ensure_ascii=False) + "\n")
    return target / "index.html"


def _newest(runs: list[StoredRun]) -> list[StoredRun]:
    """For each study the newest run of its highest preset, by name."""
    ranks = {"smoke": 0, "small": 1, "paper": 2}
    best: dict[str, StoredRun] = {}
    for run in runs:
        held = best.get(run.study)
        if held is None or ranks.get(run.preset, 0) > ranks.get(held.preset, 0):
            best[run.study] = run
    return [best[slug] for slug in sorted(best)]


def _page(run: StoredRun, study: Study | None) -> Page:
    judgements: tuple[Judgement, ...] = ()
    figure = Markup("")
    if study is not None and len(run.results):
        judgements = judge(study, run)
        title = f"{study.paper.title}: the paper's figure, redrawn from these measurements"
        figure = Markup(figure_svg(study.figure(run.results), study.slug, title))
    return Page(run, study, judgements, figure, _measurements(run.results))


def _measurements(results: Results) -> Measurements:
    """Means over seeds; a column that is a number is a metric unless it takes few values that arms share."""
    names = list(dict.fromkeys(name for record in results for name in record if name not in ("arm", "seed")))
    coordinates = tuple(name for name in names if _is_coordinate(results, name))
    metrics = tuple(name for name in names if name not in coordinates)
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in results:
        key = (record["arm"], *(record.get(name) for name in coordinates))
        groups.setdefault(key, []).append(record)
    rows = []
    for (arm, *place), records in groups.items():
        cells = []
        for metric in metrics:
            by_seed = Results(records).by_seed(metric, arm) if any(r.get(metric) is not None for r in records) else {}
            cells.append(_interval(bootstrap_mean(list(by_seed.values()))) if by_seed else "")
        rows.append((arm, tuple(_number(value) for value in place), tuple(cells)))
    return Measurements(coordinates, metrics, tuple(rows))


def _is_coordinate(results: Results, name: str) -> bool:
    """A coordinate is text, or takes the same values in every seed and several of them (or one for all)."""
    values: dict[int, set[Any]] = {}
    for record in results:
        if record.get(name) is not None:
            if isinstance(record[name], str):
                return True
            values.setdefault(record["seed"], set()).add(record[name])
    distinct = list(values.values())
    repeated = len(results) > len(set().union(*distinct)) if distinct else False
    return bool(distinct) and repeated and len(distinct) > 1 and all(found == distinct[0] for found in distinct)


def _verdicts(pages: list[Page]) -> list[dict[str, Any]]:
    return [
        {
            "study": page.run.study,
            "preset": page.run.preset,
            "seeds": list(page.run.seeds),
            "finished": page.run.finished,
            "config": page.run.config,
            "environment": page.run.environment,
            "claims": [
                {
                    "id": judgement.claim.id,
                    "statement": judgement.claim.statement,
                    "rule": judgement.claim.rule.wording,
                    "verdict": page.verdict(judgement.finding),
                    "effect": _number(judgement.finding.effect.mean),
                    "interval": [_number(judgement.finding.effect.low), _number(judgement.finding.effect.high)],
                    "bound": judgement.finding.bound,
                }
                for judgement in page.judgements
            ],
        }
        for page in pages
    ]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(effect: Any) -> str:
    return f"{effect.mean:.4g} [{effect.low:.4g}, {effect.high:.4g}]"


def _standalone(svg: str) -> str:
    return svg.replace("<svg", '<svg style="color: #444; background: white"', 1) if svg else "<svg/>"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
