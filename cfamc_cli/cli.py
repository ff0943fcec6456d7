"""The command line: signatures, help, and the one error handler. Work is imported where it is done, torch last."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer
from typer import Argument, Option

from cfamc_cli.commands import complete
from cfamc_cli.errors import CfamcError, ExitCode, invalid

app = typer.Typer(
    name="cfamc",
    help="Train vision encoders without labels that stay right under attack, and prove it.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None, help="The recipes that ship with cfamc.")
app.add_typer(recipes_app, name="recipes")
runs_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None, help="List, show and look after runs.")
app.add_typer(runs_app, name="runs")

Text: TypeAlias = str | None
Texts: TypeAlias = list[str] | None
Number: TypeAlias = int | None
File: TypeAlias = Path | None

RunArgument = Annotated[
    Text,
    Argument(metavar="RUN", help="A run: its id, path or latest; else the newest one.", autocompletion=complete.runs),
]
RunsOption = Annotated[File, Option("--runs", metavar="FOLDER", help="The run store; else CFAMC_RUNS, else ./runs.")]
DeviceOption = Annotated[str, Option(metavar="NAME", help="auto, cpu, cuda, cuda:0 or mps.")]
JsonOption = Annotated[bool, Option("--json", help="Print one JSON object to stdout, errors included.")]
QuietOption = Annotated[bool, Option("--quiet", "-q", help="Say only warnings and errors.")]
SplitOption = Annotated[
    Literal["holdout", "test"] | None,
    Option(help="Training images that the recipe holds out, or test images; the former where there are some."),
]
_RECIPE = Argument(metavar="RECIPE", help="A TOML file, or a shipped recipe's name.", autocompletion=complete.recipes)
RecipeArgument = Annotated[
    str, Argument(metavar="NAME", help="A recipe's name, or a file.", autocompletion=complete.recipes)
]


def _settings(such_as: str) -> Any:
    text = f"Such as {such_as}; repeatable."
    return Option("--set", metavar="KEY=VALUE", help=text, autocompletion=complete.settings)


def _version(wanted: bool) -> None:
    if wanted:
        from cfamc_cli.store.environment import versions

        typer.echo(versions())
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001  its callback acts
        bool, Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    _need_command(context)


@runs_app.callback()
@recipes_app.callback()
def _need_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(ExitCode.INVALID)


@app.command()
def pretrain(
    recipe: Annotated[Text, _RECIPE] = None,
    overrides: Annotated[Texts, _settings("crops.0.count=8, or 4,8,16")] = None,
    seed: Annotated[Number, Option(help="In place of the recipe's seed.")] = None,
    seeds: Annotated[Text, Option(metavar="0,1,2", help="One run per seed.")] = None,
    device: DeviceOption = "auto",
    runs: RunsOption = None,
    resume: Annotated[
        Text, Option(metavar="RUN", help="Go on with a run: its id, path, or latest.", autocompletion=complete.runs)
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the resolved recipe and its cost.")] = False,
    force: Annotated[bool, Option("--force", help="Start although the plan is beyond the memory there is.")] = False,
    plot: Annotated[bool, Option("--plot", help="Draw the curves of the training into the run's folder.")] = False,
    sweep: Annotated[File, Option(metavar="FILE", help="Lists of values for keys: a run for each combination.")] = None,
    jobs: Annotated[Number, Option(min=1, metavar="N", help="N runs at a time; what is finished is left out.")] = None,
    print_jobs: Annotated[bool, Option("--print-jobs", help="Print a line for each run that is left.")] = False,
    track: Annotated[
        Literal["tensorboard", "wandb", "trackio", "mlflow"] | None,
        Option(help="Who else hears of the run's metrics while it trains."),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train an encoder as a recipe says, and leave a run in the store."""
    from cfamc_cli.commands.common import Options
    from cfamc_cli.commands.pretrain import pretrain as train

    seeds_to_train = _seeds(seed, seeds)
    options = Options(device=device, runs=runs, quiet=quiet, as_json=json, track=track)
    several = sweep is not None or jobs is not None or print_jobs
    if recipe is not None and (several or any("," in text for text in overrides or [])):
        from cfamc_cli.commands.sweep import grid
        from cfamc_cli.commands.sweep import sweep as train_all

        points = grid(recipe, overrides or [], sweep, seeds_to_train)
        if several or len(points) > max(len(seeds_to_train), 1):
            if resume is not None or dry_run:
                raise invalid("several runs take neither --resume nor --dry-run", "--print-jobs lists those left")
            flags = ["--force"] * force + ["--plot"] * plot + (["--track", track] if track else [])
            train_all(recipe, points, jobs=jobs or 1, print_jobs=print_jobs, flags=flags, options=options)
            return
    if recipe is None and several:
        raise invalid("which recipe?", "name one, such as: cfamc pretrain quickstart --sweep FILE")
    train(
        recipe,
        overrides=overrides or [],
        seeds=seeds_to_train,
        resume=resume,
        dry_run=dry_run,
        force=force,
        plot=plot,
        options=options,
    )


@app.command()
def bench(
    recipe: Annotated[str, _RECIPE],
    overrides: Annotated[Texts, _settings("train.batch_size=50")] = None,
    seconds: Annotated[float, Option(min=0, max=3600, metavar="N", help="Time for each variant of settings.")] = 10.0,
    alone: Annotated[bool, Option("--alone", help="Measure the recipe's own settings, and no others.")] = False,
    attack: Annotated[bool, Option("--attack", help="Measure the recipe's attacks too.")] = False,
    device: DeviceOption = "auto",
    runs: RunsOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure what a recipe costs on this machine, and which settings it should use; needs no data."""
    from cfamc_cli.commands.bench import bench as measure
    from cfamc_cli.commands.common import Options

    options = Options(device=device, runs=runs, quiet=quiet, as_json=json)
    measure(recipe, overrides=overrides or [], seconds=seconds, alone=alone, attack=attack, options=options)


@app.command()
def probe(
    run: Annotated[
        Text,
        Argument(
            metavar="RUN",
            help="A run: its id, path or latest; else the newest finished one.",
            autocompletion=complete.runs,
        ),
    ] = None,
    head: Annotated[
        Text,
        Option(metavar="KIND", help="linear, robust-linear, crops, knn or finetune.", autocompletion=complete.heads),
    ] = None,
    features: Annotated[Text, Option(metavar="LAYER", help="pre_feature or backbone.")] = None,
    crops: Annotated[Number, Option(metavar="N", help="Crops of an image, for --head crops.")] = None,
    epochs: Annotated[Number, Option(metavar="N", help="How long the head is trained.")] = None,
    protocol: Annotated[Text, Option(metavar="NAME", help="official or converged, for --head linear.")] = None,
    overrides: Annotated[Texts, _settings("probe.lr=0.001")] = None,
    data: Annotated[
        Texts,
        Option(metavar="NAME|FOLDER", help="Another data set than the one trained on; repeat it for a head each."),
    ] = None,
    limit: Annotated[Number, Option(min=1, metavar="N", help="Fit to N images, evenly of all classes.")] = None,
    split: SplitOption = None,
    foreign: Annotated[
        File, Option("--import", metavar="FILE", help="Make a run of foreign weights: safetensors or .pt.")
    ] = None,
    mean: Annotated[
        Text, Option(metavar="NAME|R,G,B", help="Of --import: it reads (x - mean) / std, such as imagenet's.")
    ] = None,
    std: Annotated[Text, Option(metavar="NAME|R,G,B", help="Of --import: as --mean.")] = None,
    size: Annotated[
        Number, Option(min=8, max=1024, metavar="N", help="Of --import: it reads images resized to N pixels.")
    ] = None,
    batch_norm: Annotated[
        Text, Option(metavar="BRANCH", help="Of --import: which of several batch norms, such as pgd or 1.")
    ] = None,
    network: Annotated[
        Text, Option(metavar="TEXT", help="Of --import: which of several networks, by a part of its names.")
    ] = None,
    stem: Annotated[
        Text, Option(metavar="NAME", help="Of --import: cifar, cifar-padded (solo-learn) or cifar-linear (lightly).")
    ] = None,
    architecture: Annotated[
        Text, Option(metavar="timm:NAME", help="Of --import: a network of timm, such as timm:resnet26,output_stride=8.")
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with the run's newest unfinished head.")] = False,
    device: DeviceOption = "auto",
    runs: RunsOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fit a head to a frozen encoder and measure its clean accuracy; without options as the recipe's [probe] says."""
    from cfamc_cli.commands.common import Options
    from cfamc_cli.commands.probe import Request
    from cfamc_cli.commands.probe import probe as fit
    from cfamc_cli.commands.probe_import import Import

    request = Request(
        head=head,
        features=features,
        crops=crops,
        epochs=epochs,
        protocol=protocol,
        data=data[0] if data else None,
        also=tuple(data[1:] if data else ()),
        limit=limit,
        split=split,
        overrides=tuple(overrides or ()),
    )
    options = Options(device=device, runs=runs, quiet=quiet, as_json=json)
    reading = {"mean": mean, "std": std, "size": size, "batch_norm": batch_norm, "network": network}
    reading |= {"stem": stem, "architecture": architecture}
    if foreign is None and (
        idle := [f"--{key.replace('_', '-')}" for key, value in reading.items() if value is not None]
    ):
        raise invalid(f"{', '.join(idle)} would have no effect without --import", "leave out what is of --import")
    imported = None if foreign is None else Import(foreign, mean, std, size, batch_norm, network, stem, architecture)
    fit(run, request=request, foreign=imported, resume=resume, options=options)


@app.command()
def attack(
    run: RunArgument = None,
    eps: Annotated[Texts, Option(metavar="LENGTH", help="Such as 8/255; repeat it for a curve.")] = None,
    name: Annotated[
        Text,
        Option(
            "--attack",
            metavar="NAME",
            help="pgd, fgsm, apgd-ce, apgd-dlr, apgd-t, fab, square, autoattack, autoattack-rand or embedding; "
            "or a measure: smallest, corruptions or smoothing.",
            autocompletion=complete.attacks,
        ),
    ] = None,
    steps: Annotated[Number, Option(metavar="N", help="Steps of the attack.")] = None,
    step_size: Annotated[Text, Option(metavar="LENGTH", help="Length of a step, such as 0.01.")] = None,
    restarts: Annotated[Number, Option(metavar="N", help="Restarts of the attack.")] = None,
    norm: Annotated[Text, Option(metavar="NAME", help="linf or l2, which has defaults of its own.")] = None,
    search_precision: Annotated[
        Text, Option(metavar="NAME", help="float32, or tf32 on CUDA: what it finds must hold in float32.")
    ] = None,
    queries: Annotated[Number, Option(metavar="N", help="Queries of square, for each image.")] = None,
    targets: Annotated[Number, Option(metavar="N", help="Likeliest wrong classes that fab and apgd-t aim at.")] = None,
    sigma: Annotated[Text, Option(metavar="LENGTH", help="Noise of smoothing, such as 0.25.")] = None,
    n0: Annotated[Number, Option("--n0", metavar="N", help="Noisy copies that choose a class, for smoothing.")] = None,
    n: Annotated[Number, Option("--n", metavar="N", help="Noisy copies that prove it, for smoothing.")] = None,
    alpha: Annotated[
        float | None, Option(metavar="P", help="How often a certificate may be wrong, for smoothing.")
    ] = None,
    corruptions: Annotated[
        File, Option(metavar="FOLDER", help="Published corruptions, such as CIFAR-10-C; else a set of cfamc's own.")
    ] = None,
    limit: Annotated[
        Number,
        Option(
            min=1, metavar="N", help="The first N images of a balanced order; raised, the last N % 250 are made again."
        ),
    ] = None,
    split: SplitOption = None,
    head: Annotated[
        Text,
        Option(metavar="PROBE", help="Head to attack: a probe's id, or a kind of head.", autocompletion=complete.heads),
    ] = None,
    space: Annotated[
        str, Option(metavar="NAME", help="image, or crops: each crop of the aggregated head by itself.")
    ] = "image",
    source: Annotated[
        Text,
        Option(
            metavar="RUN",
            help="Make the examples on another run, and judge them here; with --audit as a check.",
            autocompletion=complete.runs,
        ),
    ] = None,
    strict: Annotated[bool, Option("--strict", help="Make the audit, and exit with 5 if a check fails.")] = False,
    audit: Annotated[bool, Option("--audit", help="Make the full audit, which attacks again.")] = False,
    save_examples: Annotated[
        Number, Option(min=1, max=300, metavar="N", help="Draw N adversarial examples as a PNG.")
    ] = None,
    plot: Annotated[
        bool,
        Option("--plot", help="Draw loss against steps and accuracy against eps; audited, the loss around images."),
    ] = False,
    unlabelled: Annotated[
        bool, Option("--unlabelled", help="Measure the encoder by itself: no head, no labels.")
    ] = False,
    data: Annotated[Text, Option(metavar="NAME|FOLDER", help="Other images, for --unlabelled.")] = None,
    device: DeviceOption = "auto",
    runs: RunsOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure accuracy under attack; without eps or attack options as the recipe says. Cut, it goes on where it was."""
    from cfamc_cli.commands.attack import attack as evaluate
    from cfamc_cli.commands.attack_settings import Flags
    from cfamc_cli.commands.common import Options
    from cfamc_cli.commands.unlabelled import unlabelled as measure

    flags = Flags(
        eps=tuple(eps or ()),
        attack=name,
        steps=steps,
        step_size=step_size,
        restarts=restarts,
        norm=norm,
        search_precision=search_precision,
        queries=queries,
        targets=targets,
        sigma=sigma,
        n0=n0,
        n=n,
        alpha=alpha,
        corruptions=corruptions,
        limit=limit,
        split=split,
        head=head,
        space=space,
        source=source,
        strict=strict,
        audit=audit,
        save_examples=save_examples,
        plot=plot,
        unlabelled=unlabelled,
        data=data,
    )
    (measure if unlabelled else evaluate)(
        run, flags=flags, options=Options(device=device, runs=runs, quiet=quiet, as_json=json)
    )


@app.command()
def compare(
    references: Annotated[
        Texts,
        Argument(
            metavar="[STORE|RUN]...",
            help="Stores, runs or beginnings of ids; else the store.",
            autocompletion=complete.runs,
        ),
    ] = None,
    where: Annotated[
        Texts, Option(metavar="FILTER", help="Such as adversary.name=free or robust>=30; repeatable.")
    ] = None,
    sort: Annotated[str, Option(metavar="KEY", help="A metric or recipe key, with :asc or :desc.")] = "",
    baseline: Annotated[
        Text, Option(metavar="RUN", help="Hold the others against this run.", autocompletion=complete.runs)
    ] = None,
    published: Annotated[bool, Option("--published", help="Add the published table, marked as such.")] = False,
    fold: Annotated[bool, Option("--fold/--no-fold", help="One row for the seeds of a recipe.")] = True,
    limit: Annotated[int, Option(min=0, metavar="N", help="Rows of a table on a terminal; 0 for all.")] = 50,
    output: Annotated[
        Literal["rich", "json", "csv", "markdown", "latex"], Option("--format", help="What stdout gets.")
    ] = "rich",
    plot: Annotated[File, Option(metavar="FILE", help="Draw a .png, .svg or .pdf.")] = None,
    html: Annotated[File, Option(metavar="FILE", help="Write one self-contained page.")] = None,
    checklist: Annotated[
        bool, Option("--checklist", help="Print what the NeurIPS checklist asks of experiments.")
    ] = False,
    runs: RunsOption = None,
    json: JsonOption = False,
) -> None:
    """Say which encoder is better, by how much, and whether the numbers may be compared."""
    from cfamc_cli.commands.compare import compare as hold_beside

    if checklist and (json or output != "rich"):
        raise invalid("--checklist is written as Markdown alone", "leave out --json and --format")
    hold_beside(
        references or [],
        runs=runs,
        where=where or [],
        sort=sort,
        baseline=baseline,
        published=published,
        fold=fold,
        limit=limit,
        output="json" if json else output,
        plot=plot,
        html=html,
        checklist=checklist,
    )


@app.command()
def export(
    run: RunArgument = None,
    part: Annotated[
        Literal["backbone", "encoder", "classifier"] | None,
        Option(help="How much of the network; backbone unless told."),
    ] = None,
    wanted: Annotated[
        Literal["safetensors", "pt2", "onnx", "robustbench"] | None,
        Option("--format", help="How it is written; safetensors unless told."),
    ] = None,
    head: Annotated[
        Text,
        Option(
            metavar="PROBE",
            help="Head of the classifier: a probe's id, or a kind of head.",
            autocompletion=complete.heads,
        ),
    ] = None,
    metrics: Annotated[
        Literal["csv", "tensorboard"] | None, Option(help="Hand over the run's metrics, in place of weights.")
    ] = None,
    out: Annotated[File, Option(metavar="FOLDER", help="The folder to make; else one named after it.")] = None,
    force: Annotated[bool, Option("--force", help="Replace an earlier export.")] = False,
    device: DeviceOption = "auto",
    runs: RunsOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Hand over weights that load without cfamc, checked against the live model, with a model card."""
    from cfamc_cli.commands.common import Options
    from cfamc_cli.commands.export import export as hand_over

    options = Options(device=device, runs=runs, quiet=quiet, as_json=json)
    hand_over(run, part=part, wanted=wanted, head=head, metrics=metrics, out=out, force=force, options=options)


@recipes_app.command("list")
def list_recipes(json: JsonOption = False) -> None:
    """List the recipes, the quickstart first."""
    from cfamc_cli.commands import recipes
    from cfamc_cli.report import terminal

    titles = recipes.titles()
    if json:
        terminal.print_json({"recipes": [{"name": name, "title": title} for name, title in titles.items()]})
    else:
        width = max(map(len, titles))
        terminal.write_out("".join(f"{name:{width}}  {title}\n" for name, title in titles.items()))


@recipes_app.command("show")
def show_recipe(
    name: RecipeArgument,
    plot: Annotated[File, Option(metavar="FILE", help="Draw its crops, clean and perturbed, as a PNG.")] = None,
) -> None:
    """Print a recipe, comments included."""
    from cfamc_cli.commands import recipes
    from cfamc_cli.report import terminal

    text = recipes.show(name)
    if plot is not None:
        from cfamc_cli.commands.preview import draw_crops

        draw_crops(name, plot)
    terminal.write_out(text)


@recipes_app.command("copy")
def copy_recipe(
    name: RecipeArgument,
    target: Annotated[File, Argument(metavar="[TARGET]", help="A file or folder; else here.")] = None,
    force: Annotated[bool, Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Copy a recipe, to change it; prints where it lies."""
    from cfamc_cli.commands import recipes
    from cfamc_cli.report import terminal

    terminal.write_out(f"{recipes.copy(name, target, force=force)}\n")


@recipes_app.command("explain")
def explain_key(
    key: Annotated[
        str,
        Argument(
            metavar="[KEY]", help="A key such as train.epochs, or a table; else all.", autocompletion=complete.keys
        ),
    ] = "",
    json: JsonOption = False,
) -> None:
    """Say what a key of a recipe means: its unit, range and default."""
    from cfamc_cli.commands import recipes
    from cfamc_cli.report import terminal

    if json:
        from dataclasses import asdict

        from cfamc_cli.recipe.describe import explain

        terminal.print_json({"keys": [asdict(entry) for entry in explain(key)]})
    else:
        terminal.write_out(recipes.explain(key))


@recipes_app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of a recipe, for editors: of taplo and tombi, `#:schema FILE` says where it lies."""
    from cfamc_cli.commands import recipes
    from cfamc_cli.report import terminal

    terminal.write_out(recipes.json_schema())


OneRun = Annotated[
    str,
    Argument(
        metavar="RUN", help="A run: its id, a part of that, its name, a tag or its path.", autocompletion=complete.runs
    ),
]


@runs_app.command("list")
def list_runs(runs: RunsOption = None, json: JsonOption = False) -> None:
    """List the runs of a store, the newest first."""
    from cfamc_cli.commands.runs import show_list
    from cfamc_cli.store.runs import default_store

    show_list(default_store(runs), as_json=json)


@runs_app.command("show")
def show_run(run: RunArgument = None, runs: RunsOption = None) -> None:
    """Print one page: what a run is, its curves, and all that was measured on it."""
    from cfamc_cli.commands.runs import show
    from cfamc_cli.store.runs import default_store

    show(default_store(runs), run)


@runs_app.command("watch")
def watch_run(run: RunArgument = None, runs: RunsOption = None) -> None:
    """Follow a run that trains elsewhere on this machine, until it ends."""
    from cfamc_cli.commands.runs import watch
    from cfamc_cli.store.runs import default_store

    watch(default_store(runs), run)


@runs_app.command("tag")
def tag_run(
    run: OneRun,
    words: Annotated[list[str], Argument(metavar="WORD...", help="To call it by.")],
    runs: RunsOption = None,
) -> None:
    """Give a run tags, by which every command finds it."""
    from cfamc_cli.commands.runs import tag
    from cfamc_cli.store.runs import default_store

    tag(default_store(runs), run, words, remove=False)


@runs_app.command("untag")
def untag_run(
    run: OneRun,
    words: Annotated[Texts, Argument(metavar="[WORD]...", help="Tags to take away; else all.")] = None,
    runs: RunsOption = None,
) -> None:
    """Take tags away from a run."""
    from cfamc_cli.commands.runs import tag
    from cfamc_cli.store.runs import default_store

    tag(default_store(runs), run, words or [], remove=True)


@runs_app.command("rm")
def remove_runs(
    references: Annotated[
        list[str], Argument(metavar="RUN...", help="Runs, as of any command.", autocompletion=complete.runs)
    ],
    yes: Annotated[bool, Option("--yes", "-y", help="Do not ask.")] = False,
    runs: RunsOption = None,
) -> None:
    """Remove runs with all that was measured on them, after a question."""
    from cfamc_cli.commands.runs import remove
    from cfamc_cli.store.runs import default_store

    remove(default_store(runs), references, yes=yes)


@runs_app.command("gc")
def clear_runs(
    references: Annotated[
        Texts, Argument(metavar="[RUN]...", help="Runs; else all of the store.", autocompletion=complete.runs)
    ] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what it would free, and do nothing.")] = False,
    runs: RunsOption = None,
    json: JsonOption = False,
) -> None:
    """Remove the checkpoints of each run but its newest whole one."""
    from cfamc_cli.commands.runs import clear
    from cfamc_cli.store.runs import default_store

    clear(default_store(runs), references or [], dry_run=dry_run, as_json=json)


def _seeds(seed: int | None, seeds: str | None) -> list[int]:
    if seed is not None and seeds is not None:
        raise invalid("--seed and --seeds exclude each other")
    if seeds is None:
        return [] if seed is None else [seed]
    try:
        listed = [int(part) for part in seeds.split(",")]
    except ValueError as error:
        message = f"--seeds: {seeds[:80]!r} is not a list of whole numbers"
        raise invalid(message, "write it as: --seeds 0,1,2") from error
    if len(set(listed)) < len(listed):
        raise invalid(f"--seeds: {seeds[:80]!r} names a seed twice")
    return listed


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code; every failure is told in one line, or in one JSON object.

    Args:
        arguments: What stands behind the program's name.
    """
    as_json = "--json" in arguments
    try:
        open_standard_streams()
        with complete.joined_for_bash():
            code = app(list(arguments), prog_name="cfamc", standalone_mode=False)
        if as_json and code == ExitCode.INTERRUPTED:  # what Typer makes of Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else int(ExitCode.DONE)
    except CfamcError as error:
        return _report(error, as_json=as_json)
    except BrokenPipeError:
        return int(ExitCode.DONE)
    except KeyboardInterrupt:
        return _report(CfamcError("interrupted", exit_code=ExitCode.INTERRUPTED), as_json=as_json)
    except BaseException as error:
        return _report(_explained(error), as_json=as_json)


def _explained(error: BaseException) -> CfamcError:
    """What a failure that is not cfamc's own means to the person; of a defect, the trace is shown."""
    if isinstance(error, typer.Abort):
        return CfamcError("interrupted", exit_code=ExitCode.INTERRUPTED)
    describe = getattr(error, "format_message", None)  # how the parser of the command line words its complaints
    if describe is not None:
        message = " ".join(str(describe()).split()).replace(" Value error, ", " ") or "nothing to do"
        command = getattr(getattr(error, "ctx", None), "command_path", "cfamc")
        return invalid(message, f"{command} --help lists what there is")
    if isinstance(error, MemoryError):
        return CfamcError("out of memory", hint="lower train.batch_size, crops.0.count or model.width")
    if isinstance(error, OSError):
        return CfamcError(f"{error.filename or 'the system'}: {(error.strerror or str(error)).lower()}")
    if not isinstance(error, Exception):  # the interpreter's own ways to end
        raise error
    import traceback

    traceback.print_exception(error)
    hint = "this is a defect of cfamc: please report it, with the lines above"
    return CfamcError(f"{type(error).__name__}: {error}", hint=hint)


def _report(error: CfamcError, *, as_json: bool) -> int:
    from cfamc_cli.commands.common import leads
    from cfamc_cli.report import terminal

    terminal.error(error)
    if as_json and leads():
        failure = {"message": error.message, "hint": error.hint, "exit_code": int(error.exit_code), **error.details}
        with suppress(CfamcError):  # a stdout that takes nothing takes no complaint either
            terminal.print_json({"error": failure})
    return int(error.exit_code)


def open_standard_streams() -> None:
    """Give closed standard streams to the null device, before a file takes their numbers."""
    import os

    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
