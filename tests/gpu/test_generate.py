"""Generation on a GPU: streamed, with fast kernels and a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eightgig.engine.generate import generate
from eightgig.ops.choose import choose_ops
from tests import engines, tiny
from tests.gpu.test_engine import GPU_PLAN

pytestmark = pytest.mark.gpu

# The window of the sliding layers is 8.
LENGTHS = (5, 1, 40, 8)
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    families = tiny.TRAINABLE_FAMILIES
    return {family: tiny.make_model(family, root / family) for family in families}


def _run(
    engine: engines.Engine, ops: object, *, forced: Tensor | None = None, has_cache: bool = True
) -> tuple[Tensor, Tensor]:
    """Tokens (rows, steps) and logits (rows, steps, V), of the tokens `forced` if given."""
    prompts = [row["ids"].tolist() for row in engines.random_rows(engine.spec, LENGTHS, seed=5)]
    seen: list[Tensor] = []

    def allowed(made: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
        seen.append(logits.float().cpu())
        if forced is None:
            return logits
        only = torch.full_like(logits, float("-inf"))
        return only.scatter_(1, forced[:, len(made[0]), None].to(logits.device), 0.0)

    steps = generate(
        engine.model,
        ops,
        prompts,
        max_new_tokens=NEW_TOKENS,
        stop_ids=(),
        allowed=allowed,
        micro_batch_tokens=45,
        has_cache=has_cache,
    )
    tokens = torch.tensor(list(steps)).t()
    return tokens, torch.stack(seen, dim=1)


def _engine(folder: Path, tmp_path: Path, **changes: object) -> tuple[engines.Engine, object]:
    plan = engines.make_plan(**changes)
    engine = engines.make_engine(folder, tmp_path, plan=plan, poison=plan.device == "cuda")
    dtype = getattr(torch, plan.compute_dtype)
    return engine, choose_ops(device=plan.device, dtype=dtype, kernels=plan.kernels)[0]


@pytest.mark.parametrize("family", tiny.TRAINABLE_FAMILIES)
def test_float32_answers_equal_those_of_the_cpu(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tokens, expected = _run(*_engine(folders[family], tmp_path))
    gpu = _engine(folders[family], tmp_path, **GPU_PLAN)
    gpu_tokens, logits = _run(*gpu, forced=tokens)
    assert torch.equal(gpu_tokens, tokens)
    assert float((logits - expected).norm() / expected.norm()) <= 1e-4


@pytest.mark.parametrize("family", tiny.TRAINABLE_FAMILIES)
def test_bfloat16_with_a_cache_is_as_near_to_float32_as_without(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tokens, exact = _run(*_engine(folders[family], tmp_path))
    plan = {**GPU_PLAN, "compute_dtype": "bfloat16", "kernels": "auto"}
    engine, ops = _engine(folders[family], tmp_path, **plan)
    errors = [
        float((_run(engine, ops, forced=tokens, has_cache=has)[1] - exact).norm() / exact.norm())
        for has in (True, False)
    ]
    assert errors[0] <= errors[1] * 1.2 + 1e-2, errors
