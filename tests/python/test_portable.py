"""Scoring in torch's own operators: the same numbers, in programs that need no ntkcl."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ntkcl import ops
from ntkcl.portable import portable


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Calls(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: torch.Tensor) -> Any:
        return self.function(*arguments)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (lambda qkv: ops.attention(qkv, 3), [random(2, 7, 36)]),
        (lambda qkv, gate: ops.attention(qkv, 3, gate, 2), [random(2, 7, 36), random(3)]),
        (ops.bias_relu_dropout, [random(2, 5, 8), random(8)]),
        (ops.bias_relu_dropout, [random(2, 3, 5, 8), random(2, 8)]),
        (lambda *a: ops.composed_linear(*a, [0.5, 2.0]),
         [random(4, 6), random(2, 5, 6), random(10), random(2, 6, 3), random(2, 3, 5)]),
        (lambda x, w, b, d, u, old_d, old_u, o: ops.composed_linear(
            x, w, b, d, u, [0.5, 2.0], old_down=old_d, old_up=old_u, omega=o,
            omega_scale=[1.5, 0.5]),
         [random(4, 6), random(2, 5, 6), random(10), random(2, 6, 3), random(2, 3, 5),
          random(2, 6, 6), random(2, 6, 5), random(2, 2)]),
        (lambda *a: ops.feature_fusion(*a, value_scale=0.7),
         [random(3, 6), random(3, 6), random(6, 6), random(6)]),
        (ops.gelu, [random(4, 9)]),
        (lambda *a: ops.parallel_adapter(*a, scale=0.3, residual=True),
         [random(2, 5, 8), random(4, 8), random(4), random(8, 4), random(8)]),
        (lambda *a: ops.parallel_adapter(*a, scale=0.3),
         [random(2, 3, 5, 8), random(2, 4, 8), random(2, 4), random(2, 6, 4), random(2, 6)]),
        (lambda *a: ops.residual_layer_norm(*a, eps=1e-6), [random(2, 5, 8) for _ in "xu"]
         + [random(8), random(8)]),
        (lambda x, *a: ops.residual_layer_norm(x, None, *a, eps=1e-6), [random(2, 5, 8), random(8),
         random(8)]),
        (ops.section_cosine, [random(4, 12), random(5, 12), random(3)]),
        (ops.token_mix_prompts, [random(2, 5, 8), random(3, 5), random(8), random(8)]),
        (lambda *a: ops.token_mix_prompts(*a, carried=3, scale=0.3),
         [random(2, 8, 8), random(3, 5), random(8), random(8)]),
        (lambda *a: ops.token_mix_prompts(*a, carried=3, scale=0.3, insert=False),
         [random(2, 8, 8), random(3, 5), random(8), random(8)]),
    ],
    ids=["attention", "prompts", "bias", "biases", "lora", "loras", "fusion", "gelu", "adapter",
         "adapters", "sum and norm", "norm", "cosines", "new prompts", "other prompts",
         "prompts alone"],
)  # fmt: skip
def test_an_operator_in_torchs_own(
    function: Callable[..., Any], arguments: list[torch.Tensor]
) -> None:
    program = torch.export.export(Calls(function), tuple(arguments))
    assert "ntkcl" in str(program.graph)
    plain = portable(program)
    assert "ntkcl" not in str(plain.graph)
    torch.testing.assert_close(plain.module()(*arguments), function(*arguments))


def test_what_is_not_for_scoring_is_refused() -> None:
    key = torch.tensor([7])
    dropout = Calls(lambda x, bias: ops.bias_relu_dropout(x, bias, key=key, p=0.5))
    program = torch.export.export(dropout, (random(2, 8), random(8)))
    with pytest.raises(ValueError, match=r"\[portable\] expected no dropout"):
        portable(program)
    masks = torch.export.export(Calls(lambda k: ops.philox_keep_mask(k, (4,), 0.5)), (key,))
    with pytest.raises(ValueError, match=r"\[portable\] expected operators for scoring, got ntkcl"):
        portable(masks)
