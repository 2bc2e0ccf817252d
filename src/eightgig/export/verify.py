"""An export loaded again and compared with the trained model; what differs too far is refused."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from eightgig.config import store_folder
from eightgig.disk import Disk
from eightgig.errors import DoesNotFitError, ExportError, Finding
from eightgig.evaluation.tuned_run import TunedRun
from eightgig.export.answers import (
    PRECISIONS,
    Agreement,
    Answer,
    Precision,
    Tolerance,
    compare_answers,
    tolerance_for,
)
from eightgig.export.candidates import (
    LlamaCpp,
    ask_transformers,
    has_llama_cpp,
    transformers_bytes,
)
from eightgig.export.folder import check_room
from eightgig.export.reference import (
    NUM_ANSWER_TOKENS,
    Prompts,
    Reference,
    choose_prompts,
    measure_merged,
    measure_reference,
    measure_unquantised,
)
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
    "bf16": "bfloat16",
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
        trained_loss, exported_loss: Held-out loss as trained, and of the exported weights.
    """

    is_verified: bool
    program: str
    reference: str = ""
    prompts: str = ""
    agreement: Agreement | None = None
    tolerance: Tolerance | None = None
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
    folder: Path, exported: TunedRun, references: References, observe: Observe
) -> Verification:
    """Load merged weights again and compare: by Transformers, or if too large by our own engine.

    Raises:
        ExportError: They disagree, or cannot be loaded.
    """
    spec = exported.base.spec
    stored = _STORED_PRECISIONS[spec.dtype]
    needed_bytes, free_bytes = transformers_bytes(spec), psutil.virtual_memory().available
    if needed_bytes <= free_bytes:
        observe("Loading the merged model with Transformers")
        answers = ask_transformers(
            folder,
            spec,
            references.prompts.ids,
            num_tokens=NUM_ANSWER_TOKENS,
            end_ids=references.prompts.end_ids,
        )
        return _compared("Transformers", answers, stored, references)
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
        found = measure_merged(exported, plan, references.prompts, folder, Path(prepared))
    stored = max(stored, found.precision, key=PRECISIONS.index)
    return _compared("eightgig's engine", found.answers, stored, references)


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
        _check_prompts(model, exported, prompts)
        _check_stops(model, exported)
        answers = [
            model.ask(prompt, num_tokens=NUM_ANSWER_TOKENS, end_ids=references.prompts.end_ids)
            for prompt in prompts
        ]
    return _compared("llama.cpp", answers, gguf_precision(kind), references)


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
    program: str, answers: Sequence[Answer], stored: Precision, references: References
) -> Verification:
    """The verification of `answers`.

    Raises:
        ExportError: They disagree.
    """
    reference = references.closest
    tolerance = tolerance_for(stored, reference.precision)
    agreement = compare_answers(reference.answers, answers, tolerance)
    if not agreement.is_within:
        raise ExportError(
            f"The export was deleted again: {program} answers otherwise than the trained model.",
            why=f"{agreement.worst[:1].upper()}{agreement.worst[1:]}; {agreement.num_same_answers} "
            f"of {agreement.num_prompts} answers are the same, the largest divergence is "
            f"{agreement.divergence:.3g} nats where {tolerance.divergence:g} are allowed.",
            fix="Please report this; --no-verify exports without the test.",
        )
    exported = references.exported
    return Verification(
        is_verified=True,
        program=program,
        reference=reference.words,
        prompts=references.prompts.source,
        agreement=agreement,
        tolerance=tolerance,
        trained_loss=references.trained.loss,
        exported_loss=None if exported is None else exported.loss,
    )


def _check_prompts(model: LlamaCpp, tuned: TunedRun, prompts: Sequence[Sequence[int]]) -> None:
    tokenizer = tuned.tokenizer
    for number, prompt in enumerate(prompts, start=1):
        text = str(tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False))
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = model.tokenize(text)
        if found != expected:
            place = next(
                (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
                min(len(expected), len(found)),
            )
            raise ExportError(
                "The export was deleted again: llama.cpp cuts the prompts into other tokens.",
                why=f"Prompt {number} differs from token {place + 1} on: "
                f"{found[place : place + 3]} instead of {expected[place : place + 3]}.",
                fix="Use --to merged, which keeps the tokenizer, and please report this.",
            )


def _check_stops(model: LlamaCpp, tuned: TunedRun) -> None:
    unknown = sorted(token for token in tuned.stop_ids if not model.is_stop(token))
    if unknown:
        pieces = ", ".join(repr(tuned.tokenizer.convert_ids_to_tokens(t)) for t in unknown[:3])
        raise ExportError(
            f"The export was deleted again: llama.cpp does not stop at {pieces}.",
            why="Answers would go on after their end.",
            fix="Use --to merged, and please report this.",
        )
