"""The subcommands: each parses its arguments, calls one function of the library and draws.

Whatever is slow to import is imported inside a command.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eightgig.cli import render
from eightgig.config import Config, read_config, starting_values, store_folder, write_example
from eightgig.errors import (
    ConfigError,
    DataError,
    DoesNotFitError,
    HardwareError,
    RunError,
    TrainingStopped,
)
from eightgig.run import Run, check_run

if TYPE_CHECKING:
    from eightgig.cli.inputs import Asked


class ExportKind(Enum):
    """What `export --to` takes."""

    MERGED = "merged"
    GGUF = "gguf"
    GGUF_LORA = "gguf-lora"
    OLLAMA = "ollama"
    ADAPTER = "adapter"


def _flag(name: str, meaning: str) -> Any:
    """An option that is there or not; without a metavar typer shows that it took a <bool>."""
    return typer.Option(name, metavar="", help=meaning)


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The config.yaml to use.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="GROUP.NAME=VALUE", help="Put a setting over the file's; repeatable."
    ),
]
AsJson = Annotated[bool, _flag("--json", "Write JSON to standard output.")]


def _require_finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


def init(
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Hub id or folder; by default what suits this machine."),
    ] = None,
    data: Annotated[
        str, typer.Option(metavar="DATA", help="File with the rows to train on.")
    ] = "data.jsonl",
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Where to write the config; never over a file.")
    ] = Path("config.yaml"),
    as_json: AsJson = False,
) -> None:
    """Write a commented config.yaml for a model, a data file and this machine."""
    from eightgig.hardware.probe import probe

    machine = probe()
    has_gpu = machine.device == "cuda"
    values = starting_values(model=model, data=data, config_path=output, has_gpu=has_gpu)
    write_example(output, values, notes=(f"This machine: {render.machine_words(machine)}.",))
    render.show_new_config(output, values, machine, as_json=as_json)


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can do, and the exact fix for what it cannot."""
    from eightgig.hardware.doctor import examine

    render.show_note("Looking at this machine; torch alone takes 10 to 40 seconds.")
    examination = examine()
    render.show_examination(examination, as_json=as_json)
    if not examination.can_train:
        raise typer.Exit(HardwareError.exit_code)


def plan(  # noqa: PLR0913 - the arguments of a command are its options
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="The config.yaml to plan for.")
    ] = None,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A model, instead of a config's.")
    ] = None,
    vram: Annotated[
        str | None,
        typer.Option(metavar="CARD", help="Another card: its memory (8GiB) or name (RTX 4060)."),
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="With --vram: main memory of that machine (32GiB)."),
    ] = None,
    has_display: Annotated[
        bool, _flag("--display", "With --vram: the card draws the desktop, too.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Longest row in tokens.")
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="NAME=A,B,...", help="One plan for each value of a setting."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the memory by item: .svg or .png.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say before a weight is loaded whether it fits, what goes where, and why."""
    from eightgig.cli.inputs import CardOptions, read_request
    from eightgig.cli.plan_view import show_plan
    from eightgig.memory.plan import make_plan

    asked = read_request(
        config,
        overrides or [],
        model=model,
        card=CardOptions(vram, ram=ram, has_display=has_display),
        max_tokens=max_tokens,
    )
    if sweep is not None:
        _sweep(asked, sweep, picture=picture, as_json=as_json)
        return
    made = make_plan(
        asked.spec, asked.hardware, asked.config, rows=asked.rows, is_prepared=asked.is_prepared
    )
    show_plan(made, asked, picture=picture, as_json=as_json)
    if not made.fits:
        raise typer.Exit(DoesNotFitError.exit_code)


def _sweep(asked: Asked, text: str, *, picture: Path | None, as_json: bool) -> None:
    from eightgig.cli.inputs import read_sweep
    from eightgig.cli.plan_view import show_sweep
    from eightgig.memory.sweep import sweep

    if picture is not None:
        raise ConfigError(
            "--picture draws one plan; --sweep makes several.",
            why="An option without effect would be taken for one that worked.",
            fix="Leave one of them out.",
        )
    key, values = read_sweep(text)
    points = sweep(
        asked.spec,
        asked.hardware,
        asked.with_values(key, values),
        rows=asked.rows,
        is_prepared=asked.is_prepared,
    )
    show_sweep(key, points, as_json=as_json)


def check(
    config: ConfigPath,
    overrides: Overrides = None,
    strict: Annotated[bool, _flag("--strict", "Take warnings for errors.")] = False,
    token_ids: Annotated[
        bool, _flag("--token-ids", "Show the numbers of the sample's tokens.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every row, say what is wrong with it, and show how the model will see it."""
    settings = read_config(config, overrides or ())
    from eightgig.cli.data_view import show_data
    from eightgig.cli.inputs import find_tokenizer
    from eightgig.cli.progress import WorkView
    from eightgig.data.checks import check_data

    tokenizer = find_tokenizer(settings)
    with WorkView(stderr=True) as view:
        report = check_data(
            settings.data,
            tokenizer,
            seed=settings.train.seed,
            cache_dir=store_folder(settings.model) / "tokens",
            progress=view.rows,
        )
    show_data(report, token_ids=token_ids, as_json=as_json)
    if report.has_errors or (strict and report.has_warnings):
        raise typer.Exit(DataError.exit_code)


def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, _flag("--resume", "Go on from the newest intact checkpoint.")] = False,
    allow_changed_versions: Annotated[
        bool,
        _flag(
            "--allow-changed-versions",
            "Resume also with other versions of the libraries: not bit for bit the same run.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter; everything is written into the run folder."""
    settings = read_config(config, overrides or ())
    from eightgig.cli.progress import TrainingView
    from eightgig.finetune import finetune
    from eightgig.training.signals import catch_stop_signals
    from eightgig.web.report import write_report

    view = TrainingView(settings, as_json=as_json)
    try:
        with view:
            for report in finetune(
                settings,
                resume=resume,
                allow_changed_versions=allow_changed_versions,
                observe=view.notice,
            ):
                view.step(report)
        # Whole before a stop is obeyed: what is half imported cannot be imported again.
        with catch_stop_signals() as stop_request:
            write_report(check_run(settings, resume=True))
        if stop_request.is_requested:
            raise KeyboardInterrupt
        render.show_trained(settings, view.last_report, as_json=as_json)
    except (KeyboardInterrupt, TrainingStopped) as stop:
        if isinstance(stop, KeyboardInterrupt):  # first: another Ctrl-C may end the report
            words = _resume_command(config, overrides or ())
            render.show_note(f"Interrupted. Go on with: {words}")
        if view.last_report is not None:
            _report_stopped(settings)
        raise


def _report_stopped(settings: Config) -> None:
    """Write the report; where it cannot be, why the run stopped matters more."""
    from eightgig.web.report import write_report

    try:
        write_report(check_run(settings, resume=True))
    except RunError as error:
        render.show_note(f"{error.message} {error.fix}")


def _resume_command(config: Path, overrides: Sequence[str]) -> str:
    """What to type to go on, with the settings that were put over the file's."""
    settings = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["eightgig", "train", str(config), *settings, "--resume"])


def demo(
    output_dir: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the run folder is made.")
    ] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Train the embedded model on its data, offline, and show what it learned."""
    from eightgig.cli.demo import demo_config, run_demo
    from eightgig.cli.evaluation_view import show_demo
    from eightgig.cli.progress import TrainingView

    config = demo_config(output_dir.absolute())
    try:
        with TrainingView(config, as_json=as_json) as view:
            result, pairs = run_demo(config, view)
        show_demo(result, pairs, as_json=as_json)
    except KeyboardInterrupt:
        render.show_note(f"Interrupted. {_demo_words(config)}")
        raise


def _demo_words(config: Config) -> str:
    """What can be done with the run of a demo that was left; the next demo makes another."""
    run = Run(folder=Path(config.run.output_dir, config.run.name))
    if run.adapter_path.exists():
        words = shlex.join(["eightgig", "chat", str(run.folder)])
        return f"The adapter is trained; talk with it: {words}"
    if run.config_path.exists():
        return f"Go on with: {_resume_command(run.config_path, ())}"
    return "Nothing was written yet; call it again."


def evaluate(  # noqa: PLR0913 - the arguments of a command are its options
    run: RunFolder,
    overrides: Overrides = None,
    max_answers: Annotated[
        int, typer.Option(metavar="N", min=0, help="Held-out rows that are answered.")
    ] = 200,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Longest answer in tokens; by default a quarter more than the longest reference.",
        ),
    ] = None,
    general_text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text to measure forgetting on, instead of what comes with eightgig.",
        ),
    ] = None,
    with_null: Annotated[
        bool,
        _flag("--null", "Train on shuffled answers, too, to compare with: twice as long."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare base and tuned model on the rows that a run held out."""
    from eightgig.cli.evaluation_view import show_evaluation
    from eightgig.cli.progress import WorkView
    from eightgig.hardware.allocator import prepare_allocator

    prepare_allocator()  # before torch is imported
    from eightgig.evaluation.evaluate import evaluate_run
    from eightgig.evaluation.passes import EvaluationOptions
    from eightgig.evaluation.tuned_run import find_run
    from eightgig.training.card import add_evaluation
    from eightgig.training.null_adapter import null_adapter_path, train_null_adapter
    from eightgig.web.report import write_report

    options = EvaluationOptions(
        max_answers=max_answers,
        max_new_tokens=max_new_tokens,
        general_text=general_text,
        null_adapter=null_adapter_path(run) if with_null else None,
    )
    with WorkView(stderr=True) as view:
        if with_null:
            for report in train_null_adapter(run, view.notice, overrides=overrides or ()):
                view.notice(f"null adapter: step {report.step}, loss {report.loss:.4f}")
        evaluation = evaluate_run(run, options, view.notice, overrides=overrides or ())
    add_evaluation(find_run(run), evaluation)
    report_path = write_report(find_run(run))
    show_evaluation(evaluation, report_path, as_json=as_json)


def chat(  # noqa: PLR0913 - the arguments of a command are its options
    run: RunFolder,
    overrides: Overrides = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Answer this and end; otherwise converse.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system turn.")] = None,
    with_base: Annotated[bool, _flag("--base", "Begin with the adapter off.")] = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T",
            min=0,
            callback=_require_finite,
            help="0 takes the likeliest token; by default as the model says.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Longest answer in tokens.")
    ] = 1024,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Of the draws.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Talk with a tuned model, and with its base model beside it."""
    from eightgig.cli.progress import WorkView
    from eightgig.hardware.allocator import prepare_allocator

    prepare_allocator()  # before torch is imported
    from eightgig.chat import ChatOptions, open_conversation
    from eightgig.cli.chat_view import answer_once, converse, prepare_input

    if prompt is None:
        prepare_input()

    options = ChatOptions(
        temperature=temperature,
        max_new_tokens=max_tokens,
        seed=seed,
        system=system,
        has_adapter=not with_base,
    )
    with WorkView(stderr=True) as view:
        conversation = open_conversation(run, options, view.notice, overrides=overrides or ())
    with conversation:
        if prompt is not None:
            answer_once(conversation, prompt, as_json=as_json)
        else:
            converse(conversation)


def export(  # noqa: PLR0913 - the arguments of a command are its options
    run: RunFolder,
    to: Annotated[
        ExportKind,
        typer.Option(
            "--to", metavar="KIND", help="What to write: merged, gguf, gguf-lora, ollama, adapter."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where; by default in the run folder.")
    ] = None,
    gguf_type: Annotated[
        str | None, typer.Option("--type", metavar="TYPE", help="Of a GGUF: f16, bf16, q8_0, ...")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Other base weights than the run's.")
    ] = None,
    is_unverified: Annotated[
        bool, _flag("--no-verify", "Do not load the export again and compare it.")
    ] = False,
    ollama_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Create this model in Ollama, too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hand the tuned model on: merged, as GGUF, for Ollama; tested before it is put in place."""
    from eightgig.cli.progress import WorkView
    from eightgig.hardware.allocator import prepare_allocator

    prepare_allocator()  # before torch is imported
    from eightgig.export.export import KINDS, ExportOptions, export_run
    from eightgig.training.signals import stop_like_ctrl_c

    options = ExportOptions(
        kind=next(kind for kind in KINDS if kind == to.value),
        output=output,
        base=base,
        gguf_type=gguf_type,
        is_verified=not is_unverified,
        ollama_name=ollama_name,
    )
    with WorkView(stderr=True) as view, stop_like_ctrl_c():
        done = export_run(run, options, view.notice)
    render.show_export(done, as_json=as_json)


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The adapter/ of a run, or an export.")
    ],
    repository: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="The repository on the hub.")
    ],
    is_public: Annotated[
        bool, _flag("--public", "A new repository can be seen by everybody.")
    ] = False,
    is_sure: Annotated[
        bool, _flag("--yes", "Upload; without it, only what would be is shown.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what of an adapter or an export would go to the Hugging Face hub, or upload it."""
    from eightgig.export.push import plan_upload
    from eightgig.export.push import push as upload_now

    upload = plan_upload(folder, repository, is_private=not is_public)
    address = upload_now(upload) if is_sure else None
    render.show_upload(upload, address, as_json=as_json)


def bench(  # noqa: PLR0913 - the arguments of a command are its options
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="e2b, e4b, 12b, 31b, llama8b, qwen14b, a hub id or a folder."
        ),
    ],
    tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of each row.")] = 2048,
    rows: Annotated[int, typer.Option(metavar="N", help="Rows of an optimizer step.")] = 8,
    budget: Annotated[
        str, typer.Option(metavar="SIZE", help="What the allocator may reserve, e.g. 6.75GiB.")
    ] = "auto",
    rank: Annotated[int, typer.Option(metavar="R", help="LoRA rank.")] = 16,
    overrides: Overrides = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=A,B,...",
            help="Values of a setting, or of tokens, rows, rank; repeatable: every combination.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Steps to time.")] = 8,
    has_own_layers: Annotated[
        bool,
        _flag("--own-layers", "Give each layer bytes of its own; takes more disk."),
    ] = False,
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON lines to append to; a table goes beside it.")
    ] = Path("bench.jsonl"),
    as_json: AsJson = False,
) -> None:
    """Time optimizer steps on random weights of a model's shape, to compare cards and settings."""
    from eightgig.cli.bench_view import read_results, show_bench, write_result
    from eightgig.cli.inputs import read_sweep
    from eightgig.training.bench_cases import make_cases, run_cases

    shared = [f"tokens={tokens}", f"rows={rows}", f"rank={rank}", f"budget={budget}"]
    cases = make_cases(
        model,
        [*shared, f"lora_alpha={2 * rank}", *(overrides or [])],
        [read_sweep(text, option="--compare") for text in compare or []],
        timed_steps=steps,
        shares_layers=not has_own_layers,
    )
    read_results(output)  # a file of another kind is refused before anything is timed
    outcomes = []
    for outcome in run_cases(cases, render.show_note):
        outcomes.append(outcome)
        if outcome.result is not None:
            write_result(outcome.result, output)
    show_bench(outcomes, output, as_json=as_json)


ALL: Mapping[str, Callable[..., None]] = MappingProxyType(
    {
        "demo": demo,
        "init": init,
        "doctor": doctor,
        "plan": plan,
        "check": check,
        "train": train,
        "eval": evaluate,
        "chat": chat,
        "export": export,
        "push": push,
        "bench": bench,
    }
)
