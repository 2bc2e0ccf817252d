"""An export loaded again and compared with the trained model; what differs too far is refused."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from eightgig.config import store_folder
from eightgig.data.tokenizer import load_tokenizer
from eightgig.disk import Disk
from eightgig.errors import DoesNotFitError, ExportError, Finding
from eightgig.evaluation.tuned_run import TunedRun
from eightgig.export.answers import (
    Agreement,
    Precision,
    Tolerance,
    compare_answers,
    tolerance_for,
)
from eightgig.export.candidates import (
    LlamaCpp,
    has_llama_cpp,
    score_by_transformers,
    transformers_bytes,
)
from eightgig.export.folder import check_room
from eightgig.export.reading import check_prompts, check_stops, check_template
from eightgig.export.reference import (
    NUM_ANSWER_TOKENS,
    Prompts,
    Reference,
    choose_prompts,
    measure_reference,
    measure_unquantised,
    score_merged,
)
from eightgig.export.weight_check import DefinedWeights, WeightCheck
from eightgig.hardware.probe import probe
from eightgig.memory.fit import refuse_misfit
from eightgig.memory.plan import Plan, make_plan
from eightgig.models.space import estimate_store_bytes
from eightgig.run import Run
from eightgig.units import format_bytes

Observe = Callable[[object], None]

_GGUF_PRECISIONS: Mapping[str, Precision] = {
    "f32": "float32",
    "f16": "16 bit",
    "bf16": "bfloat16 weights",
    "q8_0": "8 bit",
}
_STORED_PRECISIONS: Mapping[str, Precision] = {
    "float32": "float32",
    "float16": "16 bit",
    "bfloat16": "bfloat16 weights",
}
# The base model and the data of the training give the loss that the run wrote down, up to the
# arithmetic of another device.
_LOSS_TOLERANCE = 0.02
# A divergence grows with the square of a change: where it is a tenth of what training has moved, a
# third of the change is gone.
_SAID_SHARE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class References:
    """What exports of a run are compared with.

    Attributes:
        prompts: What was asked.
        trained: The model as it was trained.
        exported: The adapter on the exported, unquantised weights; None where that is the
            trained model itself, or there was no room for it.
        why_not: Why there is none, in words; empty where it is not needed.
    """

    prompts: Prompts
    trained: Reference
    exported: Reference | None
    why_not: str = ""

    @property
    def closest(self) -> Reference:
        """The one that an export must equal most closely."""
        return self.exported or self.trained

    @property
    def answer_ids(self) -> list[tuple[int, ...]]:
        """The answers that an export is asked about."""
        return [answer.ids for answer in self.closest.answers]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """How an export was tested; part of `export.json`.

    Attributes:
        is_verified: Whether it was loaded again and agreed.
        program: What loaded it; why nothing did where it was not verified.
        reference: What it was compared with.
        prompts: Where the prompts come from.
        agreement: What was found.
        tolerance: What was allowed.
        reading: The same with the numbers before rounding in place of the stored ones.
        weights: How far the written numbers are from their definition.
        effect: How far training has moved the same answers, in nats a token.
        trained_loss, exported_loss: Held-out loss as trained, and of the exported weights.
    """

    is_verified: bool
    program: str
    reference: str = ""
    prompts: str = ""
    agreement: Agreement | None = None
    tolerance: Tolerance | None = None
    reading: Agreement | None = None
    weights: WeightCheck | None = None
    effect: float | None = None
    trained_loss: float | None = None
    exported_loss: float | None = None


def make_references(
    tuned: TunedRun, exported: TunedRun, place: Path, observe: Observe
) -> References:
    """Answers of the trained model, and of the weights that are exported.

    Args:
        tuned: The run as it was trained.
        exported: The same with the base model that is exported.
        place: Where a copy of the layers may lie for a while.
        observe: Told what is done.

    Raises:
        ExportError: Base model and data do not give the loss that the run wrote down.
        EightgigError: The trained model cannot be loaded.
    """
    observe("Asking the trained model")
    prompts, plan = choose_prompts(tuned, observe)
    trained = measure_reference(tuned, plan, prompts, observe)
    _check_loss(tuned.run, trained.loss)
    is_same = tuned.config.model.quantization == "none" and exported.base == tuned.base
    if is_same:
        return References(prompts=prompts, trained=trained, exported=None)
    try:
        found = _unquantised(exported, prompts, place, observe)
    except DoesNotFitError as error:
        return References(prompts=prompts, trained=trained, exported=None, why_not=error.message)
    return References(prompts=prompts, trained=trained, exported=found)


def why_not_verified(kind: str) -> str | None:
    """What is missing to test an export of this kind; None where nothing is."""
    if kind.startswith(("gguf", "ollama")) and not has_llama_cpp():
        return 'llama-cpp-python is not installed (pip install "eightgig[verify-gguf]")'
    return None


def verify_merged(
    folder: Path,
    exported: TunedRun,
    exact: DefinedWeights,
    references: References,
    observe: Observe,
) -> Verification:
    """Load merged weights again and compare: by Transformers, or if too large by our own engine.

    Transformers is asked a second time with the numbers before they were rounded: what differs
    then was read otherwise, and has no rounding to hide behind.

    Raises:
        ExportError: They disagree, or cannot be loaded.
    """
    spec = exported.base.spec
    stored = _STORED_PRECISIONS[spec.dtype]
    needed_bytes, free_bytes = transformers_bytes(spec), psutil.virtual_memory().available
    tokenizer = load_tokenizer(folder)
    check_prompts(
        "Transformers",
        lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
        exported,
        references.prompts,
    )
    check_template("Transformers", tokenizer.chat_template, exported)
    if needed_bytes <= free_bytes:
        observe("Loading the merged model with Transformers")
        # Of a base model that was fetched file by file nothing is left to compute them of.
        modules = exact.by_module() if exported.base.hub is None else {}
        scores, unrounded = score_by_transformers(
            folder, spec, references.prompts.ids, references.answer_ids, modules
        )
        found = _compared("Transformers", scores, (stored,), references)
        if not modules:
            return found
        reading = _compared("Transformers", unrounded, ("float32",), references)
        return replace(found, reading=reading.agreement)
    too_large = (
        f"Transformers on the processor needs {format_bytes(needed_bytes)} of main memory, "
        f"{format_bytes(free_bytes)} are free"
    )
    try:
        plan = _unquantised_plan(exported, references.prompts, folder)
    except DoesNotFitError as error:
        return Verification(is_verified=False, program=f"{too_large}; {error.message}")
    observe("Loading the merged model with eightgig's engine")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".merged-") as prepared:
        scores, arithmetic = score_merged(
            exported,
            plan,
            references.prompts,
            references.closest.answers,
            merged=folder,
            folder=Path(prepared),
        )
    return _compared("eightgig's engine", scores, (stored, arithmetic), references)


def verify_gguf(
    path: Path, exported: TunedRun, references: References, kind: str, *, lora: Path | None = None
) -> Verification:
    """Load a GGUF by llama.cpp, compare how it reads the prompts and what it answers.

    Args:
        path: The model.
        exported: The run with the base model that was exported.
        references: What to compare with.
        kind: Its type, `q8_0` or the like.
        lora: An adapter that is put on it.

    Raises:
        ExportError: They disagree, or it cannot be loaded.
    """
    prompts = references.prompts.ids
    context_tokens = max(map(len, prompts)) + NUM_ANSWER_TOKENS
    with LlamaCpp(path, context_tokens=context_tokens, lora=lora) as model:
        check_prompts("llama.cpp", model.tokenize, exported, references.prompts)
        check_stops(model, exported)
        check_template("llama.cpp", model.chat_template, exported)
        scores = [model.score(*pair) for pair in zip(prompts, references.answer_ids, strict=True)]
    return _compared("llama.cpp", scores, (gguf_precision(kind),), references)


def gguf_precision(kind: str) -> Precision:
    """How coarse a GGUF type is, as llama.cpp computes with it."""
    return _GGUF_PRECISIONS.get(kind, "4 bit")


def unverified_finding(verification: Verification) -> Finding:
    """Says that an export was not tested, and why."""
    return Finding(
        severity="warning",
        code="export.not_verified",
        message="The export was not loaded again and compared with the trained model: "
        f"{verification.program}.",
        why="A file that was written without a fault may still be read otherwise.",
        fix="Ask it a few questions that `eightgig chat` answered before you rely on it.",
    )


def rounding_finding(verification: Verification) -> Finding | None:
    """Says that rounding has taken a good part of what was trained; None if it has not."""
    found, effect = verification.agreement, verification.effect
    if found is None or effect is None:
        return None
    if found.divergence <= max(_SAID_SHARE * effect, tolerance_for("float32").divergence):
        return None
    return Finding(
        severity="warning",
        code="export.rounding",
        message=f"The export differs from the trained model by {found.divergence:.2g} nats a "
        f"token; training moved the same answers by {effect:.2g}.",
        why="Its numbers are right, but have too few bits for so small a change; or the model that "
        "it is compared with was itself in 4 bit.",
        fix="Choose a finer type (--type f16), or keep the adapter apart: --to adapter, gguf-lora.",
    )


def _unquantised(exported: TunedRun, prompts: Prompts, place: Path, observe: Observe) -> Reference:
    """The answers of the exported weights by our own engine.

    Raises:
        DoesNotFitError: There is no room for them on the disk or the device.
    """
    plan = _unquantised_plan(exported, prompts, place)
    observe("Asking the exported weights through eightgig's engine")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".unquantised-") as folder:
        return measure_unquantised(exported, plan, prompts, Path(folder), observe)


def _unquantised_plan(exported: TunedRun, prompts: Prompts, place: Path) -> Plan:
    """A plan for the exported weights as they are.

    Raises:
        DoesNotFitError: There is no room for them where `place` is, or on the device.
    """
    if exported.base.hub is not None:
        raise DoesNotFitError(
            "the base weights are not kept on this machine (model.delete_download)", why="", fix=""
        )
    spec, config = exported.base.spec, exported.config
    check_room(place, estimate_store_bytes(spec, quantization="none"), Disk())
    data = config.data
    if prompts.held_out is not None:
        data = replace(data, max_length=max(2, int(prompts.held_out.lengths.max())))
    model = replace(config.model, quantization="none")
    hardware = probe(config.memory.device, store_folder(config.model))
    plan = make_plan(spec, hardware, replace(config, model=model, data=data))
    refuse_misfit(plan, hardware)
    return plan


def _check_loss(run: Run, loss: float | None) -> None:
    """Compare a held-out loss with the last one that the run wrote down."""
    recorded = _recorded_loss(run)
    if loss is None or recorded is None or abs(loss - recorded) <= _LOSS_TOLERANCE * max(1, loss):
        return
    raise ExportError(
        f"Nothing was exported: the held-out loss of this adapter is {loss:.4f}, and was "
        f"{recorded:.4f} at the end of the run.",
        why="The base model or the data have changed since, or the adapter is of another run.",
        fix="Restore the base model and data of the training, or export with --no-verify.",
    )


def _recorded_loss(run: Run) -> float | None:
    """The last held-out loss in events.jsonl."""
    if not run.events_path.is_file():
        return None
    loss = None
    for line in run.events_path.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("kind") == "eval":
            value = (event.get("values") or {}).get("held_out_loss")
            loss = float(value) if isinstance(value, (int, float)) else loss
    return loss


def _compared(
    program: str,
    scores: Sequence[NDArray[np.float32]],
    precisions: tuple[Precision, ...],
    references: References,
) -> Verification:
    """The verification of what a program finds likely at each place of the reference's answers.

    Raises:
        ExportError: They disagree.
    """
    reference = references.closest
    tolerance = tolerance_for(*precisions, reference.precision, effect=reference.effect)
    agreement = compare_answers(reference.answers, scores, tolerance)
    if not agreement.is_within:
        raise ExportError(
            f"The export was deleted again: {program} answers otherwise than the trained model.",
            why=f"{agreement.worst[:1].upper()}{agreement.worst[1:]}, where "
            f"{tolerance.divergence:g} are allowed ({tolerance.prompt_divergence:g} for a single "
            f"answer); it would choose {agreement.num_same_tokens} of {agreement.num_tokens} "
            f"tokens alike. The training itself moved them by {reference.effect:.3g}.",
            fix="If its type is a coarse one, choose a finer one (--type f16) or keep the adapter "
            "apart (--to adapter); else please report this. --no-verify exports without the test.",
        )
    exported = references.exported
    return Verification(
        is_verified=True,
        program=program,
        reference=reference.words,
        prompts=references.prompts.source,
        agreement=agreement,
        tolerance=tolerance,
        effect=reference.effect,
        trained_loss=references.trained.loss,
        exported_loss=None if exported is None else exported.loss,
    )
