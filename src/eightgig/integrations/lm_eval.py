"""A tuned run, or its base model, as a model of lm-evaluation-harness.

```python
import lm_eval
from eightgig.integrations.lm_eval import open_lm

with open_lm(Path("runs/first")) as lm:
    tuned = lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])
    lm.use_adapter(False)
    base = lm_eval.simple_evaluate(model=lm, tasks=["arc_easy"])
```

Install it with the extra `lm-eval`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from eightgig.data.batches import IGNORE_INDEX, Batch, Dataset, make_batch
from eightgig.engine.assemble import Engine
from eightgig.engine.generate import AnswerLimits, Sampling, answer_prompts
from eightgig.evaluation.loss import measure_row_losses
from eightgig.evaluation.tuned_run import (
    TunedRun,
    answer_bytes,
    build_engine,
    open_run,
    plan_conversation,
    with_room,
)
from eightgig.memory.plan import Plan

MAX_ANSWER_TOKENS = 256
"""Of an answer, where a task does not say."""

_MOST_SCORED_TOKENS = 1024
# Copies of a token's logits that exist at a time, as float32.
_LOGIT_BYTES = 8 * 4
# Settings of a task's generation that are understood here or that change nothing.
_KNOWN_SETTINGS = frozenset(
    {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "num_beams"}
)

Request = tuple[tuple[str, str], list[int], list[int]]


class EightgigLM(TemplateLM):  # type: ignore[misc]
    """A model of lm-evaluation-harness that streams its layers.

    Args:
        tuned: The run.
        engine: Its engine.
        plan: What the engine was built for.
    """

    def __init__(self, tuned: TunedRun, engine: Engine, plan: Plan) -> None:
        super().__init__()
        self.tokenizer = tuned.tokenizer
        self._tuned = tuned
        self._engine = engine
        self._plan = plan
        self.max_length = min(plan.max_length, tuned.base.spec.decoder.max_positions)
        scored = answer_bytes(plan) // (_LOGIT_BYTES * tuned.base.spec.decoder.vocab_size)
        self._most_scored = max(1, min(scored, _MOST_SCORED_TOKENS))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def use_adapter(self, has_adapter: bool) -> None:
        """Let the tuned or the base model answer from now on."""
        self._engine.model.use_adapter(has_adapter)

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        eos = self._tuned.settings.eos_id
        return min(self._tuned.stop_ids) if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """Token that a text without context follows."""
        bos = self._tuned.settings.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Name under which tokens may be kept."""
        return str(self._tuned.run.adapter_path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of `string`, behind the token that begins texts unless it is there already."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=False)["input_ids"]
        bos = self._tuned.settings.bos_id
        wants_bos = add_special_tokens is not False and bos is not None
        return [bos, *ids] if wants_bos and bos is not None and ids[:1] != [bos] else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation under the template of the training."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows of the longest row planned for."""
        del disable_tqdm
        rows: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            parts = [make_disjoint_window(window) for window in windows]
            rows += parts
            counts.append(len(parts))
        losses = measure_row_losses(self._engine.model, _make_rows(rows), self._plan)
        bounds = np.cumsum([0, *counts])
        return [
            -float(losses.sums[start:end].sum())
            for start, end in itertools.pairwise(bounds.tolist())
        ]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first stop text of each request."""
        del disable_tqdm
        answers = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=str)
            by_settings.setdefault(key, []).append(place)
        for places in by_settings.values():
            settings = requests[places[0]].args[1]
            texts = self._generate([requests[place].args[0] for place in places], settings)
            for place, text in zip(places, texts, strict=True):
                answers[place] = text
        return answers

    def _generate(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        unknown = sorted(set(settings) - _KNOWN_SETTINGS)
        if unknown or settings.get("num_beams", 1) != 1:
            raise ValueError(
                f"generation settings that are not supported: {unknown or 'num_beams'}"
            )
        most = min(int(settings.get("max_gen_toks", MAX_ANSWER_TOKENS)), self.max_length - 1)
        kept = self.max_length - most
        made = answer_prompts(
            self._engine.model,
            self._engine.ops,
            [self.tok_encode(context)[-kept:] for context in contexts],
            AnswerLimits(
                max_new_tokens=most,
                stop_ids=self._tuned.stop_ids,
                memory_bytes=answer_bytes(self._plan),
                micro_batch_tokens=self._plan.micro_batch_tokens,
            ),
            sampling=_sampling(settings),
        )
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        return [self._cut(ids, stops) for ids in made]

    def _cut(self, ids: Sequence[int], stops: Sequence[str]) -> str:
        kept = [token for token in ids if token not in self._tuned.stop_ids]
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        for stop in filter(None, stops):
            text = text.split(stop, 1)[0]
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether greedy decoding gives it."""
        del disable_tqdm
        rows = _make_rows([self._shortened(*request[1:]) for request in requests])
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for places in self._groups(rows):
            batch = make_batch(rows, places)
            logprobs, is_greedy = self._score(batch)
            ends = np.cumsum([_count_scored(rows, place) for place in places])
            for place, start, end in zip(places, [0, *ends[:-1]], ends, strict=True):
                part = slice(int(start), int(end))
                results[place] = float(logprobs[part].sum()), bool(is_greedy[part].all())
        return results

    def _shortened(
        self, context: list[int], continuation: list[int]
    ) -> tuple[list[int], list[int]]:
        """Context and continuation with what is too long left out at the beginning."""
        continuation = continuation[-(self.max_length - 1) :]
        return context[-(self.max_length - len(continuation)) :], continuation

    def _groups(self, rows: Dataset) -> Iterator[list[int]]:
        """Rows that pass together: as many tokens, and scored ones, as fit."""
        group: list[int] = []
        tokens = scored = 0
        for place in np.argsort(-rows.lengths, kind="stable").tolist():
            length, count = int(rows.lengths[place]), _count_scored(rows, place)
            is_full = (
                tokens + length > self._plan.micro_batch_tokens
                or scored + count > self._most_scored
            )
            if group and is_full:
                yield group
                group, tokens, scored = [], 0, 0
            group.append(place)
            tokens, scored = tokens + length, scored + count
        if group:
            yield group

    def _score(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of each labelled token, and whether it is the likeliest, (n,) each."""
        model = self._engine.model
        places = torch.from_numpy(np.flatnonzero(batch.labels != IGNORE_INDEX))
        labels = torch.from_numpy(batch.labels.astype(np.int64))[places].to(model.device)
        logprobs, is_greedy = [], []
        parts = zip(places.split(self._most_scored), labels.split(self._most_scored), strict=True)
        for some, wanted in parts:
            inputs = model.embedding.prepare(batch).result()
            logits = model.next_logits([inputs], None, tokens=[some.to(model.device)])
            picked = logits.gather(1, wanted[:, None])[:, 0]
            logprobs.append((picked - logits.logsumexp(1)).double().cpu())
            is_greedy.append((logits.argmax(1) == wanted).cpu())
        return torch.cat(logprobs), torch.cat(is_greedy)


def open_lm(folder: Path, *, overrides: Sequence[str] = ()) -> EightgigLM:
    """The run in `folder` for lm-evaluation-harness; leaving it as a context frees the memory.

    Args:
        folder: The run folder.
        overrides: `memory.NAME=VALUE` settings for this machine.

    Raises:
        EightgigError: The run has not ended, does not fit this machine, or is damaged.
    """
    tuned = open_run(folder, lambda _: None, overrides=overrides)
    plan = plan_conversation(tuned)
    plan = with_room(plan, tuned, plan.max_length, MAX_ANSWER_TOKENS)
    return EightgigLM(tuned, build_engine(tuned, plan, lambda _: None), plan)


def _make_rows(pairs: Sequence[tuple[list[int], list[int]]]) -> Dataset:
    """Contexts and continuations as rows whose continuations carry loss."""
    ids = [np.array([*context, *scored], np.int32) for context, scored in pairs]
    labels = [
        np.array([*[IGNORE_INDEX] * len(context), *scored], np.int32) for context, scored in pairs
    ]
    return Dataset(
        input_ids=np.concatenate([np.zeros(0, np.int32), *ids]),
        labels=np.concatenate([np.zeros(0, np.int32), *labels]),
        offsets=np.cumsum([0, *map(len, ids)]).astype(np.int64),
        row_ids=np.arange(len(pairs)),
        fingerprint="",
        summary={},
    )


def _count_scored(rows: Dataset, place: int) -> int:
    span = rows.labels[rows.offsets[place] : rows.offsets[place + 1]]
    return int(np.count_nonzero(span[1:] != IGNORE_INDEX))


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """Greedy unless a task asks for draws."""
    temperature = float(settings.get("temperature") or 0.0)
    if not settings.get("do_sample", temperature > 0):
        return Sampling()
    return Sampling(
        temperature=temperature or 1.0,
        top_k=int(settings.get("top_k") or 0),
        top_p=float(settings.get("top_p") or 1.0),
    )
