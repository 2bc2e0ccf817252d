"""Every decision in words: what, why, and the best alternative that was not taken."""

from __future__ import annotations

import dataclasses

from eightgig.config import AUTO, Choice
from eightgig.memory import estimate, host_estimate
from eightgig.memory.problem import Problem, Solution
from eightgig.memory.search import Candidate
from eightgig.memory.workload import Workload
from eightgig.units import format_bytes

_SET = "set in the config"
# What a candidate decides; slots and the head's tile follow.
_DECISIONS = (
    "micro_batch_tokens",
    "micro_batches_per_visit",
    "mlp_tile_tokens",
    "checkpoints",
    "offload",
)
_SAME_RATIO = 0.01


def explain(problem: Problem, solution: Solution) -> tuple[Choice, ...]:
    """The choices of a plan, in the order a reader asks for them."""
    choices = [
        _max_length(problem, solution),
        _micro_batch_tokens(problem, solution),
        _micro_batches_per_visit(problem, solution),
        _layer_slots(problem, solution),
        _mlp_tile_tokens(problem, solution),
        _head(solution),
        _checkpoints(problem, solution),
        _offload(problem, solution),
        _optimizer(problem, solution.work),
        _host_weights(problem, solution),
        _tables(solution),
        _kernels(problem, solution),
        _compute_dtype(problem, solution.work),
    ]
    return tuple(choice for choice in choices if choice is not None)


def _max_length(problem: Problem, solution: Solution) -> Choice:
    length, longest = solution.work.max_length, solution.longest_row_tokens
    limit = (
        "no row of 64 tokens fits"
        if longest is None
        else f"rows of up to {longest:,} tokens would fit"
    )
    if problem.config.data.max_length != AUTO:
        reason = f"{_SET}; {limit}"
    elif problem.rows is None:
        reason = f"no data is known; {limit}"
    elif length < problem.wanted_length:
        reason = f"the longest that fits; the longest row has {problem.wanted_length:,} tokens"
    else:
        reason = f"the longest row; {limit}"
    return Choice(name="max_length", value=f"{length}", reason=reason)


def _micro_batch_tokens(problem: Problem, solution: Solution) -> Choice:
    best = solution.best
    tokens = best.layout.micro_batch_tokens
    if problem.config.memory.micro_batch_tokens != AUTO:
        reason = _SET
    elif tokens == solution.work.max_length:
        reason = "one longest row; more tokens at a time are not faster, or do not fit"
    else:
        reason = "short rows are packed: larger matrix products, fewer visits"
    return Choice(
        name="micro_batch_tokens",
        value=f"{tokens}",
        reason=reason,
        rejected=_best_other(solution, "micro_batch_tokens"),
    )


def _micro_batches_per_visit(problem: Problem, solution: Solution) -> Choice:
    count = solution.best.layout.micro_batches_per_visit
    if problem.config.memory.micro_batches_per_visit != AUTO:
        reason = _SET
    elif not solution.work.has_device:
        reason = "weights lie where they are used: a visit costs nothing"
    elif count == 1:
        reason = "one micro-batch keeps the device busy while the next layer is copied"
    else:
        reason = f"{count} micro-batches share each copy and dequantisation of a layer"
    return Choice(
        name="micro_batches_per_visit",
        value=f"{count}",
        reason=reason,
        rejected=_best_other(solution, "micro_batches_per_visit"),
    )


def _layer_slots(problem: Problem, solution: Solution) -> Choice:
    best, work = solution.best, solution.work
    slots, everything = best.layout.layer_slots, estimate.slots_for_everything(work)
    slot = format_bytes(estimate.slot_bytes(work))
    if problem.config.memory.layer_slots != AUTO:
        reason = _SET
    elif slots >= everything:
        reason = f"all {work.num_layers} layers and the head stay: nothing is copied again"
    elif best.time.waiting_seconds > 0.01 * best.time.seconds:
        share = best.time.waiting_seconds / best.time.seconds
        reason = f"as many as are worth it; {share:.0%} of a step still waits for copies"
    else:
        reason = "copies hide behind the computation"
    if 0 < slots - estimate.RING_SLOTS < everything - estimate.RING_SLOTS:
        stay = min(work.num_layers, slots - estimate.RING_SLOTS)
        reason = f"{reason}; {stay} of {work.num_layers} layers stay"
    more = everything - slots
    rejected = ""
    if more > 0:
        rejected = f"{everything} (all resident): {format_bytes(more * estimate.slot_bytes(work))}"
        rejected += " more, no faster" if reason.startswith("copies hide") else " more"
    return Choice(
        name="layer_slots", value=f"{slots}", reason=f"{reason} ({slot} each)", rejected=rejected
    )


def _mlp_tile_tokens(problem: Problem, solution: Solution) -> Choice:
    is_set = problem.config.memory.mlp_tile_tokens != AUTO
    return Choice(
        name="mlp_tile_tokens",
        value=f"{solution.best.layout.mlp_tile_tokens}",
        reason=_SET if is_set else "the MLP's intermediate exists for one tile at a time",
        rejected=_best_other(solution, "mlp_tile_tokens"),
    )


def _head(solution: Solution) -> Choice:
    work, layout = solution.work, solution.best.layout
    rows, tile = estimate.head_chunk_rows(work), layout.head_tile_tokens
    whole = format_bytes(4 * work.step_loss_tokens * work.decoder.vocab_size)
    return Choice(
        name="head",
        value=f"{rows} rows x {tile} tokens",
        reason="a chunk of the vocabulary fills a slot; logits exist for one tile of tokens",
        rejected=f"all logits of a step at once: {whole}",
    )


def _checkpoints(problem: Problem, solution: Solution) -> Choice:
    best, work = solution.best, solution.work
    size = format_bytes(estimate.checkpoint_bytes(work, best.layout))
    if not work.has_device:
        reason = f"main memory is the device: {size}"
    elif problem.config.memory.checkpoints != AUTO:
        reason = f"{_SET}: {size}"
    elif best.layout.checkpoints == "host":
        reason = f"{size} of layer inputs wait in pinned memory; the link has time for them"
    else:
        reason = f"{size} of layer inputs fit on the device"
    return Choice(
        name="checkpoints",
        value=best.layout.checkpoints,
        reason=reason,
        rejected=_best_other(solution, "checkpoints"),
    )


def _offload(problem: Problem, solution: Solution) -> Choice:
    chosen = solution.best.layout.offload
    if problem.config.memory.offload != AUTO:
        reason = _SET
    elif chosen:
        size = format_bytes(estimate.offload_bytes(solution.work, solution.best.layout))
        reason = f"{size} wait in pinned memory instead of being recomputed; the link has time"
    elif not solution.work.has_device:
        reason = "outputs would wait in the same memory: they are recomputed"
    elif solution.best.layout.checkpoints == "device":
        reason = "outputs would wait where layer inputs do: on the device, at its memory's cost"
    else:
        reason = "every output is recomputed: keeping one is hardly faster, or does not fit"
    return Choice(
        name="offload",
        value=", ".join(chosen) or "none",
        reason=reason,
        rejected=_best_other(solution, "offload"),
    )


def _optimizer(problem: Problem, work: Workload) -> Choice:
    size = format_bytes(estimate.optimizer_state_bytes(work) + 2 * 4 * work.master_elements)
    optim = problem.config.train.optim
    if not work.has_device:
        return Choice(name="optimizer", value="host", reason=f"main memory is the device: {size}")
    if optim == "adamw_torch":
        card = _with_optim(work, "adamw_8bit")
        extra = estimate.lora_device_bytes(card) - estimate.lora_device_bytes(work)
        extra += estimate.optimizer_device_bytes(card)
        return Choice(
            name="optimizer",
            value="host",
            reason=f"float32 masters, gradients and moments, {size}, updated while layers compute",
            rejected=f"adamw_8bit: {format_bytes(extra)} more VRAM",
        )
    managed = estimate.managed_bytes(work)
    paged = f"; {format_bytes(managed)} of it in managed memory, outside the budget's cap"
    return Choice(
        name="optimizer",
        value="device",
        reason=f"{optim} is {_SET}: {size} with the adapter{paged if managed else ''}",
        rejected="adamw_torch: masters and moments in host memory",
    )


def _with_optim(work: Workload, optim: str) -> Workload:
    return dataclasses.replace(work, optim=optim)


def _host_weights(problem: Problem, solution: Solution) -> Choice | None:
    best, work = solution.best, solution.work
    if not work.has_device:
        return None
    place = best.host_weights
    size = host_estimate.layer_blobs_bytes(work) + host_estimate.head_table_bytes(work)
    pinned = host_estimate.pinned_bytes(host_estimate.host_bytes(work, best.layout, "pinned"))
    limit = format_bytes(problem.hardware.pin_limit_bytes)
    if problem.config.memory.host_weights != AUTO:
        reason = _SET
    elif place == "pinned":
        reason = f"{format_bytes(pinned)} can be pinned: copies run at the link's full rate"
    elif place == "pageable":
        reason = f"this system pins {limit}, not {format_bytes(pinned)}: copies take a detour"
    elif best.layout.layer_slots >= estimate.slots_for_everything(work):
        reason = "layers are read once and then stay on the device"
    else:
        waiting = best.time.waiting_seconds
        cost = f"{waiting:.0f} s of each step" if waiting >= 1 else "hidden by the computation"
        reason = f"{format_bytes(size)} do not fit in main memory; reading them from disk: {cost}"
    rejected = f"pinned: needs {format_bytes(pinned)} of main memory"
    if place == "pinned":
        rejected = "mapped: slower copies"
    return Choice(name="host_weights", value=place, reason=reason, rejected=rejected)


def _tables(solution: Solution) -> Choice:
    tables = host_estimate.table_bytes(solution.work)
    size = format_bytes(sum(tables.values()))
    return Choice(
        name="tables",
        value="host",
        reason="embeddings are rows gathered on the CPU; the head is copied chunk by chunk",
        rejected=f"on the device: {size}",
    )


def _kernels(problem: Problem, solution: Solution) -> Choice:
    best, hardware = solution.best, problem.hardware
    kernels, rejected = best.layout.kernels, ""
    if kernels == "triton":
        plain = dataclasses.replace(best.layout, kernels="plain")
        more = sum(estimate.device_bytes(solution.work, plain).values()) - best.peak_bytes
        rejected = f"plain: slower, {format_bytes(more)} more"
    if problem.config.memory.kernels != AUTO:
        reason = _SET
    elif kernels == "triton":
        reason = "Triton is installed and the card runs it"
    elif hardware.device == "cpu":
        reason = "fused kernels need a GPU"
    elif not hardware.has_triton:
        reason = "Triton is not installed: more memory and slower (`eightgig doctor`)"
    else:
        reason = "the card is older than compute capability 7.5"
    return Choice(name="kernels", value=kernels, reason=reason, rejected=rejected)


def _compute_dtype(problem: Problem, work: Workload) -> Choice:
    reasons = {
        "bfloat16": "the card multiplies bfloat16 at full speed",
        "float16": "the card has no fast bfloat16; the residual stream is float32",
        "float32": "on a processor float32 is exact and faster than bfloat16",
    }
    del problem
    return Choice(
        name="compute_dtype", value=work.compute_dtype, reason=reasons[work.compute_dtype]
    )


def _best_other(solution: Solution, name: str) -> str:
    """The best candidate with another `name`, as like the chosen one as can be, and why it lost."""
    best = solution.best
    chosen = getattr(best.layout, name)
    others = [c for c in solution.candidates if getattr(c.layout, name) != chosen]
    if not others:
        return ""

    def differences(other: Candidate) -> int:
        pairs = ((getattr(other.layout, each), getattr(best.layout, each)) for each in _DECISIONS)
        return sum(theirs != ours for theirs, ours in pairs)

    other = min(others, key=lambda c: (not c.fits, differences(c), c.time.seconds, c.peak_bytes))
    value = getattr(other.layout, name)
    shown = ", ".join(value) or "none" if isinstance(value, tuple) else f"{value}"
    if not other.fits_device:
        return f"{shown}: needs {format_bytes(other.peak_bytes)}"
    if not other.fits_host:
        return f"{shown}: needs {format_bytes(other.host_bytes)} of main memory"
    return f"{shown}: {_compared(other, best)}"


def _compared(other: Candidate, best: Candidate) -> str:
    slower = other.time.seconds / best.time.seconds - 1
    if slower > _SAME_RATIO:
        speed = f"{slower:.0%} slower"
    elif slower < -_SAME_RATIO:
        speed = f"only {-slower:.0%} faster"
    else:
        speed = "no faster"
    more, more_host = other.peak_bytes - best.peak_bytes, other.host_bytes - best.host_bytes
    if more:
        return f"{speed}, {format_bytes(abs(more))} {'more' if more > 0 else 'less'}"
    if more_host:
        words = "more" if more_host > 0 else "less"
        return f"{speed}, {format_bytes(abs(more_host))} {words} main memory"
    return speed if slower > _SAME_RATIO else "much the same"
