"""Runs on one page: report.html with curves, settings and a ranking."""

from dataclasses import dataclass, field
from pathlib import Path

from jlora.cli.command import run_command
from jlora.cli.flags import POSITIONAL


@dataclass(frozen=True)
class Arguments:
    """Write report.html of one or more runs, finished or not, or of a sweep."""

    runs: list[str] | str = field(metadata=POSITIONAL)
    """Run folders, or the folder of a sweep, which stands for all of its runs."""
    out: str | None = None
    """File to write; null: report.html in the one folder that is given, else in this one."""


def main(args: Arguments) -> None:
    """Writes the page; of several runs, prints the ranking, too."""
    from jlora.report.html_report import TARGET, write_report
    from jlora.report.ranking import ranking, table_lines
    from jlora.report.run_folder import run_folders

    runs = [args.runs] if isinstance(args.runs, str) else args.runs
    given = [Path(run) for run in runs]
    folders = [found for folder in given for found in run_folders(folder)]
    own = given[0] / TARGET if len(given) == 1 else Path(TARGET)
    target = Path(args.out) if args.out else own
    found = write_report(folders, target)
    if len(found) > 1:
        print("\n".join(table_lines(ranking(found))))
    print(f"report written to {target}")


if __name__ == "__main__":
    raise SystemExit(run_command(main, Arguments))
