"""The command ``python -m tuning``: run, resume, best, report, table."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from tuning import DEFAULT_URI, URI_VARIABLE, table_cli
from tuning.plan import (
    BUDGET,
    DEMO,
    KEYS,
    METHOD,
    Lines,
    check,
    columns,
    in_file,
    make_plan,
    read_study,
    reason_of,
    shown,
)
from wesam.console import DOMAIN_HELP, PROMPT_HELP, Parser, guarded, json_file, program, spare_files, table, write_json
from wesam.errors import InputError, at
from wesam.methods import METHODS
from wesam.options import spare_domain
from wesam.sam import model_names

LOCAL = "http://127.0.0.1:5000"
"""Where ``mlflow ui`` answers."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    args = _parser().parse_args(arguments)
    return guarded(lambda: _told(args))


def _told(args: argparse.Namespace) -> None:
    """Runs a command; what MLflow refuses or cannot do becomes an InputError."""
    try:
        args.run(args)
    except Exception as e:
        if not type(e).__module__.startswith("mlflow."):
            raise
        raise InputError(f"MLflow at {shown(args.tracking_uri)}: {reason_of(e)}") from None


def _parser() -> Parser:
    parser = Parser(prog="python -m tuning", description="Search for the best adapter of each image domain.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text)
        p.set_defaults(run=run)
        p.add_argument(
            "--tracking-uri", metavar="URI", default=os.environ.get(URI_VARIABLE) or DEFAULT_URI,
            help=f"MLflow server or database (default: ${URI_VARIABLE}, else {DEFAULT_URI})",
        )  # fmt: skip
        return p

    def budget(p: argparse.ArgumentParser, trials: str) -> None:
        p.add_argument("--trials", type=int, metavar="N", help=trials)
        p.add_argument("--hours", type=float, metavar="H", help="begin nothing new after so long by the clock")
        p.add_argument(
            "--gpu-hours", type=float, metavar="H", help="nor when all trials have had so much; without GPUs, of CPUs"
        )

    p = command("run", _run, "Run a study: search each domain, test the best, register it.")
    p.add_argument("study", nargs="?", type=Path, metavar="STUDY.yaml", help="a study's file; options win over it")
    p.add_argument("--demo", action="store_true", help="a small study of three procedural domains")
    p.add_argument("--name", help="the study's name (default: its domains and its prompt)")
    p.add_argument(
        "--domain", action="append", dest="domains", metavar="D",
        help=f"{DOMAIN_HELP}; may be repeated",
    )  # fmt: skip
    p.add_argument("--domains", nargs="+", action="extend", metavar="D", help="the same for several in a row")
    p.add_argument("--data", metavar="ROOT", help="where the published data sets lie (default: $WESAM_DATA)")
    p.add_argument("--prompt", metavar="KIND", help=f"{PROMPT_HELP} (default: box)")
    p.add_argument("--model", help=f"one of {', '.join(model_names())}, or a file with weights of one (default: nano)")
    budget(p, "trials per domain (default: 16)")
    p.add_argument("--steps", type=int, help="optimisation steps of a trial (default: the model's)")
    p.add_argument(
        "--crop", type=float, metavar="K", help="show the model a square around each prompt, K times as long"
    )
    p.add_argument("--from", metavar="STUDY", help="begin with the best that this study has found on its domains")
    p.add_argument("--sampler", metavar="S", help="who proposes: tpe, gp, nsga2 or random (default: tpe)")
    p.add_argument("--scheduler", metavar="S", help="who stops what is behind: asha, median or none (default: asha)")
    p.add_argument(
        "--objective", metavar="SCORE",
        help="what trials are chosen by on val: miou, f1, label-free, or auto: mIoU, but label-free without masks",
    )  # fmt: skip
    p.add_argument(
        "--joint", metavar="HOW",
        help="one configuration for all domains, by its mean gain over Direct or the worst domain's: mean or worst",
    )  # fmt: skip
    p.add_argument(
        "--minimize", action="append", metavar="COST", help="size (of the adapter) or seconds (of a step) as well"
    )
    p.add_argument("--workers", type=int, help="workers per trial (default: 1)")
    p.add_argument(
        "--gpus-per-worker", type=float, metavar="G", help="a share of one puts several trials on a card (default: 1)"
    )
    p.add_argument("--seed", type=int, help="seed of all that is random (default: 0)")
    p.add_argument(
        "--seeds", type=int, metavar="N",
        help="other seeds with which the winner, and Supervised, are trained again at the end (default: 3)",
    )  # fmt: skip
    p.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
        help="fix a hyperparameter, as in lora.rank=8",
    )  # fmt: skip
    p.add_argument("--method", help=f"how to adapt: one of {', '.join(METHODS)} (default: {METHOD}); as --set method=")
    p.add_argument("--storage", metavar="URL", help="folder or URL for checkpoints, reached by all workers")
    p.add_argument("--optuna", metavar="URL", help="database with the Optuna studies (default: a file in STORAGE/NAME)")
    p.add_argument(
        "--optuna-study", metavar="NAME", help="their name before the domain's; studies may share one (default: NAME)"
    )
    _json(p)

    p = command("resume", _resume, "Go on with a study that was stopped, or enlarge it.")
    p.add_argument("name", metavar="NAME", help="the study's name")
    budget(p, "trials per domain (default: as before)")
    p.add_argument("--optuna", metavar="URL", help="as before, where it has a password, which MLflow is not told")
    _json(p)

    p = command("best", _best, "Fetch a domain's best adapter, or list all.")
    p.add_argument(
        "domain", nargs="?", metavar="DOMAIN", help="the domain's name; without it, all champions are listed"
    )
    p.add_argument("--out", type=Path, metavar="DIR", help="folder for the adapter, its configuration and its card")
    _json(p)

    p = command("report", _report, "Write a study's report: one HTML page, and its table as Markdown.")
    p.add_argument("name", metavar="NAME", help="the study's name")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the report")

    table_cli.add_options(command("table", table_cli.run, table_cli.TEXT))
    return parser


def _json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", type=json_file, metavar="FILE", help="write the result here too")


def _run(args: argparse.Namespace) -> None:
    settings: dict[str, Any] = {}
    if args.demo:
        settings |= DEMO
    lines: Lines = {}
    if args.study:
        found, lines = read_study(args.study)
        settings |= found
    given = {k: v for k, v in vars(args).items() if k in KEYS and k != "set" and v is not None}
    lines = {k: n for k, n in lines.items() if k[0] not in given}
    with in_file(args.study, lines):
        check(settings | given)
        plan = make_plan(settings | given, args.set + ([f"method={args.method}"] if args.method else []))
    _spare(args, plan.domains)
    chosen = args.name or (args.study and "name" in settings)
    begin_with = (settings | given).get("from")

    def run(study: Any, tracker: Any) -> dict[str, Any]:
        with in_file(args.study, lines), at("from"):
            warm = study.best_of(begin_with, tracker) if begin_with else ()
        found: dict[str, Any] = study.new_study(replace(plan, warm=warm), tracker, rename=not chosen)
        return found

    _study(args, run)


def _resume(args: argparse.Namespace) -> None:
    budget = {k: getattr(args, k) for k in BUDGET if getattr(args, k) is not None}

    def run(study: Any, tracker: Any) -> dict[str, Any]:
        if args.json:
            _spare(args, study.begun_study(args.name, tracker)[1].domains)
        found: dict[str, Any] = study.resume_study(args.name, tracker, budget, args.optuna or "")
        return found

    _study(args, run)


def _spare(args: argparse.Namespace, domains: Iterable[str]) -> None:
    """Raises InputError if the result would be written over the study's file, or over a file of its domains."""
    if args.json and getattr(args, "study", None):
        spare_files(args.json, args.study)
    for domain in domains if args.json else ():
        spare_domain(args.json, domain)


def _study(args: argparse.Namespace, run: Callable[[Any, Any], dict[str, Any]]) -> None:
    """Runs or resumes, writes the report, and says what to do next."""
    print("starting Ray and MLflow ...", flush=True)
    from tuning import report, runtime, study
    from tuning.tracking import trials_page

    tracker, unwritten = _tracker(args), ""
    try:
        result = run(study, tracker)
        out = Path("runs") / result["study"] / "report"
        try:
            report.write(report.collect(tracker, result["study"]), out)
        except InputError as e:  # of a disk that is full; what was found is told nevertheless
            unwritten = str(e)
    finally:
        tracker.close()
        runtime.stop()
    write_json(args.json, result)
    print()
    print(summary(result))
    print()
    print(unwritten or f"report: {out / report.PAGE}")
    uri = tracker.uri
    option = "" if uri == DEFAULT_URI else f" --tracking-uri {quote(uri)}"
    found = next((r["domain"] for r in result["domains"] if r.get("version")), None)
    print("go on with:")
    served = uri.startswith("http")
    if not served:
        print(f"  {program('mlflow')} ui --backend-store-uri {quote(uri)}")
    print(f"  in a browser: {trials_page(uri if served else LOCAL, result['experiment_id'])}")
    if found:
        print(f"  {program('python')} -m tuning best {found} --out {found}-adapter{option}")
    failed = [r for r in result["domains"] if "error" in r]
    if failed:
        print(f"  {program('python')} -m tuning resume {result['study']}{option}")
    if unwritten:
        print(f"  {program('python')} -m tuning report {result['study']} --out DIR{option}")
    if failed or unwritten:
        raise SystemExit(1)


def summary(result: dict[str, Any]) -> str:
    """A study's result in words: the table of test scores, and what became of each domain's best adapter."""
    from tuning.card import score
    from tuning.report import share

    titles = columns(result["domains"])
    rows = [
        {
            "domain": r["domain"],
            **{title: score(r.get(key), r.get(f"{key}_sd")) for key, title in titles.items()},
            "gap closed": share(r.get("gap_closed")),
        }
        for r in result["domains"]
    ]
    gap = result["gap_between_trials"]
    lines = ["mIoU on test:", table(rows), ""]
    unknown = [r["domain"] for r in result["domains"] if r.get("score") == "label_free"]
    if result.get("seeds") == 1:
        lines[-1:] = ["best found and Supervised have one seed each: how much of it is chance is not known", ""]
    if unknown:
        lines[-1:] = [f"{', '.join(unknown)}: no masks are known; the scores are label-free", ""]
    for r in result["domains"]:
        lines.append(f"{r['domain']}: {'failed: ' + r['error'] if 'error' in r else r['outcome']}")
        if r.get("version"):
            lines.append(f"  adapter: models:/wesam-{r['domain']}/{r['version']}  (trial {r['best_trial']})")
    took = f"{result['seconds'] / 60:.1f} minutes"
    lines.append(took + (f"; gap between trials {gap['median']:.2f} s (at most {gap['max']:.2f})" if gap else ""))
    return "\n".join(lines)


def _best(args: argparse.Namespace) -> None:
    from tuning import registry
    from tuning.card import asked_with, command, judged_by

    if args.domain is None and args.out:
        raise InputError("--out needs a DOMAIN: python -m tuning best DOMAIN --out DIR")
    with registry.opened(args.tracking_uri) as tracker:
        if args.domain is None:
            rows = [_entry(e) for e in registry.champions(tracker)]
            print(_champions(rows) if rows else f"no champions at {tracker.uri}: python -m tuning run finds some")
            write_json(args.json, rows)
            return
        again = args.out and args.out.is_dir() and any(args.out.iterdir())
        entry, config = registry.fetch(tracker, args.domain, args.out)
    row = _entry(entry)
    print(_champions([row]))
    print(f"run {entry.run_id}")
    print("\n".join(f"  {k} = {v}" for k, v in sorted(config.items())))
    write_json(args.json, {**row, "run_id": entry.run_id, "config": config, "adapter": str(args.out or "")})
    if args.out:
        t = entry.tags
        before = ", in place of the one that was there" if again else ""
        card = f" and its card, {registry.CARD}"
        if not (args.out / registry.CARD).is_file():
            print(f"an older version has registered it, without a card: there is no {registry.CARD}")
            card = ""
        print(f"adapter, {registry.SETTINGS}{card}, in {args.out}{before}; go on with:")
        data = f"--domain {quote(t['domain'])} --prompt {t.get('val_prompt', t['prompt'])} --split test"
        few = f" --instances {most}" if (most := t.get("test_instances", "0")) != "0" else ""
        few += " --label-free" if judged_by(t) == "label_free" else ""
        print(f"  {program('wesam')} evaluate {data}{few} {asked_with(t, str(args.out))}")
        print(f"  {program('wesam')} {command(t, str(args.out))}")


def _champions(rows: list[dict[str, Any]]) -> str:
    """The table of champions, with the spread beside the score."""
    from tuning.card import score

    shown = []
    for r in rows:
        row = {k: v for k, v in r.items() if k != "test_sd"}
        shown.append({**row, "test": score(r["test"], r["test_sd"])})
    return table(shown)


def _entry(entry: Any) -> dict[str, Any]:
    from tuning.card import best_drawn

    t = entry.tags
    name, test, spread = entry.test
    drawn = best_drawn({k: n for k in t if (n := entry.number(k)) is not None}, name)
    return {
        "domain": entry.domain, "version": entry.version, "score": name,
        "val": entry.number(f"val_{t.get('score', name)}"), "test": test, "test_sd": spread,
        "no_model_test": drawn and drawn[1], "direct_test": entry.number(f"direct_test_{name}"),
        "supervised_test": entry.number(f"supervised_test_{name}"), "gap_closed": entry.number("gap_closed"),
        **{k: t.get(k) for k in ("prompt", "model", "study")},
    }  # fmt: skip


def _report(args: argparse.Namespace) -> None:
    from tuning import report

    tracker = _tracker(args)
    report.write(report.collect(tracker, args.name), args.out)
    print(f"report: {args.out / report.PAGE}")


def _tracker(args: argparse.Namespace) -> Any:
    from tuning.runtime import quiet
    from tuning.tracking import Tracker

    quiet()
    return Tracker(args.tracking_uri)
