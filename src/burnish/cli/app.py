"""The verbs, their arguments, and nothing else: each calls its own file once it is really run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from burnish import __version__

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fine-tune language models with LoRA on the machine you have. `--lang zh` anywhere: what is known "
    "of an error is said in Chinese (else by $LANG).",
)

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="a recipe file, or the name of a shipped recipe")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as train.lr=1e-4")
]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output with the same facts")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        print(f"burnish {__version__}")
        raise typer.Exit


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="run folder; runs/NAME where left out")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint")] = False,
    skip_before: Annotated[
        bool, typer.Option("--skip-before", help="do not answer and score before training")
    ] = False,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="train in this process, unsupervised: for debuggers")
    ] = False,
    json: Json = False,
) -> None:
    """Train: answers before, LoRA steps with checkpoints, answers after, an adapter folder."""
    from burnish.cli.train import train_command

    train_command(recipe, overrides or [], out, resume, skip_before, in_process, json)


RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run folder")]


@app.command()
def pause(run: RunName) -> None:
    """From another terminal: let a run wait after its next step, with a checkpoint."""
    from burnish.cli.wishes import pause_command

    pause_command(run)


@app.command()
def resume(run: RunName, json: Json = False) -> None:
    """Go on with a run: one that waits, in its own terminal; one that has stopped or failed, in this one."""
    from burnish.cli.wishes import resume_command

    resume_command(run, json)


@app.command()
def stop(run: RunName) -> None:
    """From another terminal: end a run after its next step, with a checkpoint."""
    from burnish.cli.wishes import stop_command

    stop_command(run)


@app.command()
def generate(
    target: Annotated[
        str, typer.Argument(metavar="RUN", help="a run folder, an adapter folder or a model folder")
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="'-' or nothing reads stdin")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="such as generation.greedy=true")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="the prompt as it stands, without template")] = False,
    json: Json = False,
) -> None:
    """Answer prompts with a run's adapter, with any PEFT adapter, or with a model alone."""
    from burnish.cli.generate import generate_command

    generate_command(target, prompts or [], set_ or [], raw, json)


@app.command()
def data(
    recipe: RecipeName,
    overrides: Overrides = None,
    show: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="print N examples, with what is trained marked")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write a page, with N examples (20 where left out)")
    ] = None,
    json: Json = False,
) -> None:
    """What the data holds: its format, its lengths, what is trained, and what to look at before training."""
    from burnish.cli.data import data_command

    data_command(recipe, overrides or [], show, json, html)


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    machine: Annotated[
        str | None, typer.Option(metavar="NAME", help="plan for another machine, such as m2-pro-32gb")
    ] = None,
    model_geometry: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="plan for a known model instead, such as qwen2-14b"),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="run the longest step once, and compare")
    ] = False,
    json: Json = False,
) -> None:
    """What would be decided for a recipe on this machine, why, the memory it takes and the time, before any
    download. Exit 3: it does not fit.
    """
    from burnish.cli.plan import Asked, plan_command

    plan_command(recipe, overrides or [], Asked(machine, model_geometry, measure, json))


@app.command()
def doctor(json: Json = False) -> None:
    """What this machine can do, and every known trap with its remedy."""
    from burnish.cli.doctor import doctor_command

    doctor_command(json)


@app.command()
def explain(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="an error message or a log; '-' or nothing reads stdin")
    ] = "-",
    json: Json = False,
) -> None:
    """What an error message means and what to try, whatever program wrote it."""
    from burnish.cli.explain import explain_command

    explain_command(source, json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="print this recipe, to copy and change")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of recipes")] = False,
) -> None:
    """List the shipped recipes, or print one."""
    from burnish.cli.recipes import recipes_command

    recipes_command(name, schema)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="a GGUF file, a model folder or an adapter folder")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    quantize: Annotated[
        str | None, typer.Option(metavar="4bit|8bit", help="of a model folder: pack it for MLX")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; left out: float32 of GGUF, SOURCE's of a folder"),
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="mlx|peft", help="of an adapter: the other one where left out")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="of an adapter: its base model, if it moved")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace OUT if it is there")] = False,
    json: Json = False,
) -> None:
    """GGUF to a Hugging Face folder, a folder to 4 or 8 bits for MLX, an adapter between PEFT and mlx-lm."""
    from burnish.cli.convert import convert_command

    convert_command(source, out, quantize, dtype, to, model, force, json)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="a run folder, or the folder of an adapter")],
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    overrides: Overrides = None,
    to: Annotated[str, typer.Option(metavar="hf|gguf|mlx|ollama", help="for which program")] = "hf",
    type: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="hf: auto, bf16, f16, f32; gguf and ollama: q8_0, f16, bf16, f32, q6_k, q5_k_m, q4_k_m; "
            "mlx: 16bit, 8bit, 4bit. The first where left out",
        ),
    ] = None,
    lora_only: Annotated[
        bool, typer.Option("--lora-only", help="the adapter alone, for hf, mlx or gguf")
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="the base's 16-bit weights, if moved or trained on packed ones"),
    ] = None,
    no_proof: Annotated[bool, typer.Option("--no-proof", help="do not load and compare it")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace an export that is there")] = False,
    json: Json = False,
) -> None:
    """Write the tuned model for another program, load it with that program, and compare it with the trained
    one. Exit 1: it is not the same, and nothing was left.
    """
    from burnish.cli.export import export_command
    from burnish.export.job import Request
    from burnish.recipe import expand

    request = Request(to, type, expand(str(out)), lora_only, force, not no_proof)
    export_command(run, request, base, overrides or [], json)


@app.command()
def report(
    run: RunName,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="the page; RUN/report.html where left out")
    ] = None,
    json: Json = False,
) -> None:
    """What became of a run, and one page of it: curves, memory, answers, recoveries; what to do next."""
    from burnish.cli.report import report_command

    report_command(run, out, json)


@app.command()
def selftest(
    backend: Annotated[str, typer.Option(metavar="auto|torch|mlx", help="which backend")] = "auto",
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda|mps|metal", help="which device; a GPU where there is one")
    ] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="without the three longest checks")] = False,
    json: Json = False,
) -> None:
    """Two minutes: does burnish compute rightly on this machine? Against the CPU; nothing is downloaded."""
    from burnish.cli.selftest import selftest_command

    selftest_command(backend, device, quick, json)
