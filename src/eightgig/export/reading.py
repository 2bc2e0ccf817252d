"""Whether a program reads an export as the training did: tokens, chat template, stops."""

from __future__ import annotations

from collections.abc import Callable

from eightgig.errors import ExportError
from eightgig.evaluation.tuned_run import TunedRun
from eightgig.export.candidates import LlamaCpp
from eightgig.export.reference import Prompts


def check_prompts(
    program: str, tokenize: Callable[[str], list[int]], tuned: TunedRun, prompts: Prompts
) -> None:
    """Compare how a program cuts the prompts into tokens.

    Args:
        program: Its name.
        tokenize: Its tokens of a text, control tokens in it read as such, nothing added.
        tuned: The run with the tokenizer of the training.
        prompts: What was asked.

    Raises:
        ExportError: It cuts them otherwise.
    """
    tokenizer = tuned.tokenizer
    for number, prompt in enumerate(prompts.ids, start=1):
        text = str(tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False))
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = tokenize(text)
        if found != expected:
            place = next(
                (i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b),
                min(len(expected), len(found)),
            )
            raise ExportError(
                f"The export was deleted again: {program} cuts the prompts into other tokens.",
                why=f"Prompt {number} differs from token {place + 1} on: "
                f"{found[place : place + 3]} instead of {expected[place : place + 3]}.",
                fix="Use --to adapter, which keeps the run's tokenizer, and please report this.",
            )


def check_template(program: str, found: object, tuned: TunedRun) -> None:
    """Compare the chat template that a program finds with the one that was trained with.

    Raises:
        ExportError: It is another one.
    """
    trained = tuned.tokenizer.chat_template
    if trained is not None and found != trained:
        raise ExportError(
            f"The export was deleted again: {program} finds another chat template in it.",
            why="The model would read other prompts than it was trained on.",
            fix="Please report this; --no-verify exports without the test.",
        )


def check_stops(model: LlamaCpp, tuned: TunedRun) -> None:
    """Compare where llama.cpp ends an answer with where the training did.

    Raises:
        ExportError: It goes on behind a token that ends answers.
    """
    unknown = sorted(token for token in tuned.stop_ids if not model.is_stop(token))
    if unknown:
        pieces = ", ".join(repr(tuned.tokenizer.convert_ids_to_tokens(t)) for t in unknown[:3])
        raise ExportError(
            f"The export was deleted again: llama.cpp does not stop at {pieces}.",
            why="Answers would go on after their end.",
            fix="Use --to merged, and please report this.",
        )
