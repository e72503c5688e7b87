"""The command line: list, show, run, report, export, new."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etude.core.checks import InputError, check_one_of

if TYPE_CHECKING:
    from rich.console import Console

    from etude.lab.engine import Outcome

__all__ = ["main"]

DONE, FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
FORMATS = ("csv", "parquet", "json")

application = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True
)

ResultsFolder = Annotated[Path, typer.Option("--results", help="The results folder.", metavar="DIR")]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 0 done, 1 a cell failed, 2 unusable arguments, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character must not end a run.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has gone; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    return code


def _dispatch(arguments: list[str] | None) -> int:
    from etude.lab.store import StoreError

    try:
        result = application(arguments, standalone_mode=False, prog_name="etude")
        return result if isinstance(result, int) else DONE
    except InputError as error:
        return _complain(str(error), UNUSABLE)
    except StoreError as error:
        return _complain(str(error), FAILED)
    except KeyboardInterrupt:
        return _complain("interrupted; finished cells are kept, the same command goes on from there", INTERRUPTED)
    except BrokenPipeError:
        raise
    except Exception as error:
        if type(error).__name__ == "Abort":  # Ctrl-C, as the command-line library tells it
            return _complain("interrupted; finished cells are kept, the same command goes on from there", INTERRUPTED)
        if hasattr(error, "format_message"):
            return _complain(_usage_message(error), UNUSABLE)
        raise


def _usage_message(error: Any) -> str:
    """The one line of a usage error of the command-line library."""
    message = str(error.format_message()).strip().rstrip(".").replace("\n", " ")
    close = sorted(getattr(error, "possibilities", None) or [])
    if close and "Did you mean" not in message:
        return f"{message}; did you mean {close[0]!r}?"
    return message if "Did you mean" in message else f"{message}; see etude --help"


def _complain(message: str, code: int) -> int:
    print("etude: " + " ".join(message.split()), file=sys.stderr)
    return code


@application.callback(invoke_without_command=True)
def _etude(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False) -> int:
    """Replay published results on neural networks and see what holds."""
    if version:
        from etude import __version__

        print(f"etude {__version__}")
    return DONE


@application.command("list")
def list_papers(theme: Annotated[str, typer.Option(help="Only this theme.")] = "") -> int:
    """List the papers."""
    from etude.lab.catalogue import listings

    found = listings()
    if theme:
        check_one_of("--theme", theme, sorted({entry.theme for entry in found if entry.theme}))
        found = [entry for entry in found if entry.theme == theme]
    width = max((len(entry.slug) for entry in found), default=0)
    themes = max((len(entry.theme) for entry in found), default=0)
    for entry in found:
        shown = f"cannot be read: {entry.error}" if entry.error else f"{entry.title} ({entry.year})"
        print(f"{entry.slug:{width}}  {entry.theme:{themes}}  {shown}")
    return DONE


@application.command()
def show(paper: str) -> int:
    """Show a paper's claims, arms and presets."""
    from etude.lab.catalogue import load

    study = load(paper)
    about = study.paper
    print(
        f"{about.title}\n{about.authors}, {about.venue or about.year}"
        + (f", arXiv {about.arxiv}" if about.arxiv else "")
    )
    print(f"\nmethod  {study.method}\narms    {', '.join(study.arms)}\nseeds   {study.seeds}")
    for claim in study.claims:
        print(f"\n{claim.id}  {claim.statement}\n    paper: {claim.paper}\n    here:  {claim.rule.wording}")
    print()
    for name, choices in study.presets.items():
        for config in choices if isinstance(choices, tuple) else (choices,):
            print(f"{name:6}  {config}")
    print(f"\n{study.usage.strip()}")
    return DONE


@application.command()
def run(
    papers: Annotated[list[str], typer.Argument(help="Papers, or 'all'.", metavar="PAPER...")],
    preset: Annotated[str, typer.Option(help="smoke, small or paper.")] = "small",
    seeds: Annotated[int | None, typer.Option(help="How many seeds.")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One field.")] = None,
    backend: Annotated[str, typer.Option(help="loky, threading, dask or ray.")] = "loky",
    workers: Annotated[int | None, typer.Option(help="Cells at a time.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda...")] = "auto",
    results: ResultsFolder = Path("results"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure finished cells anew.")] = False,
    tracker: Annotated[str | None, typer.Option(help="tensorboard, wandb or mlflow.")] = None,
) -> int:
    """Measure papers (or 'all'), then judge their claims and write the report. Finished cells are kept."""
    from rich.console import Console

    from etude.lab.catalogue import listings, load
    from etude.lab.engine import run as run_study
    from etude.lab.progress import ProgressDisplay

    slugs = (
        [entry.slug for entry in listings() if not entry.error] if papers == ["all"] else list(dict.fromkeys(papers))
    )
    studies = [load(slug) for slug in slugs]
    settings = dict(_setting(text) for text in setting or [])
    _check_settings(studies, preset, settings)
    console = Console(highlight=False)
    outcomes = []
    with ProgressDisplay(console) as display:
        for study in studies:
            outcome = run_study(
                study,
                preset=preset,
                seeds=seeds,
                settings=settings,
                backend=backend,
                workers=workers,
                device=device,
                results=results,
                fresh=fresh,
                tracker=tracker,
                listener=display,
            )
            outcomes.append(outcome)
            if outcome.interrupted:
                raise KeyboardInterrupt
    _conclude(console, outcomes, results)
    return FAILED if any(outcome.failed for outcome in outcomes) else DONE


@application.command()
def report(
    results: ResultsFolder = Path("results"),
    output: Annotated[Path | None, typer.Option(help="Where to write; DIR/report by default.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> int:
    """Write the report of a results folder."""
    page = _build_report(results, output)
    print(page)
    if open_page:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    return DONE


@application.command()
def export(
    table_format: Annotated[str, typer.Option("--format", help="csv, parquet or json.")] = "csv",
    results: ResultsFolder = Path("results"),
    output: Annotated[Path | None, typer.Option(help="The file to write.")] = None,
) -> int:
    """Write every measurement of a results folder as one table."""
    from etude.lab.export import write_table
    from etude.lab.store import Store

    check_one_of("--format", table_format, FORMATS)
    with Store(results) as store:
        path = write_table(store.runs(), table_format, output or results / f"measurements.{table_format}")
    print(path)
    return DONE


@application.command()
def new(
    name: str,
    folder: Annotated[Path, typer.Option(help="Where to make the package's folder.", metavar="DIR")] = Path(),
) -> int:
    """Write a package with a working study of your own and its test."""
    from etude.lab.template import write_study

    path = write_study(name, folder)
    print(f"{path}\nnext: pip install -e {path} && etude run {name} --preset smoke")
    return DONE


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise InputError(f"got {text!r}", where="--set", instead="write --set name=value")
    return name.strip(), value.strip()


def _check_settings(studies: list[Any], preset: str, settings: dict[str, str]) -> None:
    """Refuse unusable settings of any paper before the first is run."""
    from etude.lab.cells import configure

    for study in studies:
        configure(study, preset, settings)


def _conclude(console: "Console", outcomes: "list[Outcome]", results: Path) -> None:
    from rich.table import Table

    from etude.lab.catalogue import load
    from etude.lab.engine import judge
    from etude.lab.store import Store

    with Store(results) as store:
        runs = {run.study: run for run in reversed(store.runs())}
    for outcome in outcomes:
        _show_failures(outcome)
        stored = runs[outcome.study]
        table = Table(title=f"{outcome.study} ({stored.preset}, {len(stored.seeds)} seeds)", title_justify="left")
        for column in ("claim", "verdict", "effect", "95% interval", "held against"):
            table.add_column(column, overflow="fold")
        for judgement in judge(load(outcome.study), stored):
            finding = judgement.finding
            effect = finding.effect
            verdict = "not judged" if stored.preset == "smoke" else str(finding.verdict)
            table.add_row(
                judgement.claim.id,
                verdict,
                f"{effect.mean:.4g}",
                f"{effect.low:.4g} to {effect.high:.4g}",
                finding.bound,
            )
        console.print(table)
    page = _build_report(results, None)
    console.print(f"report: {page}\n        {page.resolve().as_uri()}", soft_wrap=True)


def _show_failures(outcome: "Outcome") -> None:
    for failure in outcome.failed:
        print(f"{outcome.study}: {failure.arm}, seed {failure.seed} failed:\n{failure.traceback}", file=sys.stderr)


def _build_report(results: Path, output: Path | None) -> Path:
    from etude.lab.catalogue import listings, load
    from etude.lab.report import build

    studies = {entry.slug: load(entry.slug) for entry in listings() if not entry.error}
    return build(results, studies, output)
