"""Operators of ntkcl, differentiable ones and steps of optimisers, for use in any PyTorch model.

Each runs on CPU and CUDA in float32, float64 and bfloat16 (computed with as float32) unless it
says otherwise, and works with autograd, autocast, ``torch.compile`` and fake tensors. They are
``torch.ops.ntkcl.*`` with argument names and documentation. Random numbers come from a key, not
from torch's generators: equal keys give equal draws on every device, for any number of threads.

Second derivatives are not implemented and raise an error. The names of steps of optimisers end with
an underscore: they change their arguments, no two of which may share memory, take float32 and
float64, and record no gradients. ``torch.compile`` takes them under ``torch.no_grad``, with their
numbers as constants: where the learning rate changes, compile the passes and not the step.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch

from ntkcl import _C  # noqa: F401  # registers the operators

__all__ = [
    "adam_step_",
    "attention",
    "bias_relu_dropout",
    "composed_linear",
    "dissimilarity",
    "feature_fusion",
    "float8_rows",
    "gelu",
    "parallel_adapter",
    "philox_keep_mask",
    "projection_energy",
    "residual_layer_norm",
    "sam_ascend_",
    "sam_step_",
    "section_cosine",
    "sgd_step_",
    "signed_projection",
    "token_mix_prompts",
]


N = TypeVar("N", int, float)
Tensors = Sequence[torch.Tensor]
Anchors = Sequence[torch.Tensor | None]


def adam_step_(
    parameters: Tensors,
    gradients: Tensors,
    means: Tensors,
    squares: Tensors,
    steps: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    anchors: Anchors = (),
    anchor_weight: float = 0.0,
    averages: Tensors = (),
    average_decay: float = 0.999,
) -> torch.Tensor:
    """A step of AdamW or Adam with a pull to anchors and a running average, in one sweep.

    As ``sgd_step_``, but for the update of the parameters, which is that of ``torch.optim.AdamW``,
    up to rounding, or of ``torch.optim.Adam``.

    Args:
        parameters: Contiguous tensors, float32 or float64, of one type and device; changed.
        gradients: As many tensors, of the parameters' shapes, types and devices.
        means: Running means of gradients, contiguous, zeros at first; changed.
        squares: Running means of squared gradients, contiguous, zeros at first; changed.
        steps: One float32 on their device: how many steps there have been with this one, at least
            1 (not checked on a GPU, where it is not read back).
        lr: The learning rate.
        betas: Decays of means and squares, each at least 0 and below 1.
        eps: Added to the denominator.
        weight_decay: Of the parameters.
        decoupled: AdamW's weight decay; False: it is added to the gradient, as Adam's.
        anchors: As for ``sgd_step_``.
        anchor_weight: As for ``sgd_step_``.
        averages: As for ``sgd_step_``.
        average_decay: As for ``sgd_step_``.

    Returns:
        As ``sgd_step_``.

    Raises:
        ValueError: Shapes, devices or layouts do not fit, or a number out of range; nothing is
            changed then.
        TypeError: An element type is not one of the above.

    Source: Loshchilov and Hutter (ICLR 2019); the rest as ``sgd_step_``.
    """
    distance: torch.Tensor = torch.ops.ntkcl.adam_step_(
        list(parameters),
        list(gradients),
        list(means),
        list(squares),
        steps,
        list(anchors),
        list(averages),
        lr,
        *betas,
        eps,
        weight_decay,
        decoupled,
        anchor_weight,
        average_decay,
    )
    return distance


def attention(
    qkv: torch.Tensor, heads: int, gate: torch.Tensor | None = None, prompts: int = 0
) -> torch.Tensor:
    """Multi-head attention over a packed projection, with prompts apart where there is a gate.

    Without a gate ``softmax(q k^T / sqrt(d)) v`` in each head. With one, tokens 1 to ``prompts``
    are prompts, which all tokens attend to by a softmax of their own, times the head's gate: at
    gate 0 the other tokens are as if there were no prompts.

    For the few hundred tokens of a vision transformer faster on CPU than torch's
    scaled_dot_product_attention (see benchmarks/ops.py). Keeps only qkv for the backward pass.
    Of bfloat16, sums and softmaxes are float32 on CPU, and where the processor multiplies bfloat16,
    weights and the scores' gradients are rounded for the products; on CUDA, where torch's own is
    the faster one, scores are rounded, too.

    Args:
        qkv: (B, T, 3*C), float32, float64 or bfloat16: a token's q, k and v, each head by head.
        heads: H, a divisor of C.
        gate: (H), of qkv's type and device.
        prompts: How many of the tokens, from the second on, are prompts; 0 without a gate.

    Returns:
        (B, T, C), of qkv's type. qkv and gate are differentiable.

    Raises:
        ValueError: Shapes or devices do not fit, or prompts without a gate.
        TypeError: An element type is not one of the above.

    Source: NTK-CL (arXiv 2407.17120), the gate as in LLaMA-Adapter (arXiv 2303.16199).
    """
    out: torch.Tensor = torch.ops.ntkcl.attention(qkv, heads, gate, prompts)
    return out


def bias_relu_dropout(
    x: torch.Tensor,
    bias: torch.Tensor,
    p: float = 0.0,
    *,
    key: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """``relu(x + bias) * keep / (1 - p)``: the middle of an adapter, in one pass over memory.

    Keeps only its result for the backward pass.

    Args:
        x: (..., r), float32, float64 or bfloat16. Copied first if it is not contiguous.
        bias: (r), of x's type and device; or (g, r) for x (g, ..., r), one for each of g adapters
            side by side.
        p: The probability of an element being dropped, 0 <= p < 1.
        key: One int64, on the CPU or on x's device (there a captured CUDA graph reads it anew at
            each replay). Use another key for each layer and step: any distinct numbers will do.
        mask: Instead of a key, of x's shape, uint8 or bool, 0 where dropped.

    Returns:
        (..., r), contiguous. Without key and mask there is no dropout, and p is not used.

    Raises:
        ValueError: Shapes or devices do not fit, p is out of range, or both key and mask are given.
        TypeError: An element type is not one of the above.

    Source: NTK-CL (arXiv 2407.17120), the adapter of the channel sub-network.
    """
    y: torch.Tensor = torch.ops.ntkcl.bias_relu_dropout(x, bias, mask, key, p)
    return y


def composed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    scale: Sequence[float],
    *,
    old_down: torch.Tensor | None = None,
    old_up: torch.Tensor | None = None,
    omega: torch.Tensor | None = None,
    omega_scale: Sequence[float] | None = None,
    composed: bool = False,
    probe: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer whose weight is composed of low-rank modules, with a low-rank backward pass.

    ``y = x W^T + bias`` for each of g matrices that read the same input (a block's q, k and v; or
    g = 1), their results side by side, where with t old modules of rank r and a current one

    ``W_j^T = weight_j^T + omega_scale[j] * sum_i omega[j, i] A_ji B_ji + scale[j] * A_j B_j``

    What is computed of x does not grow with the number of modules, as the weight is composed first;
    composing it and the gradient of omega do. Gradients of the modules go through ``x A`` and
    ``dy B^T``, or through the gradient of the weight where that is cheaper.

    Args:
        x: (..., in), float32, float64 or bfloat16.
        weight: (g, out, in), of x's type: the pretrained weight, or with ``composed`` the whole W.
        bias: (g*out), of x's type.
        down: (g, in, r), A of the current module; float32 or float64, or of x's type.
        up: (g, r, out), B of the current module, of down's type as all that follow.
        scale: g numbers; where 0, the current module takes no part.
        old_down: (g, in, t*r), A of the old modules side by side; a constant.
        old_up: (g, t*r, out), B of the old modules; a constant.
        omega: (g, t), their weights.
        omega_scale: g numbers, 1 by default; where 0, the old modules take no part (they may be in
            the weight).
        composed: Whether ``weight`` already holds the modules.
        probe: (g), any numbers: with a gradient required, its gradient is no derivative but the
            importance ``mean |W_j * dL/dW_j|`` of each matrix; or (g, out, in), and it is
            ``W_j * dL/dW_j``.

    Returns:
        (..., g*out), of x's type. x, weight, bias, down, up and omega are differentiable.

    Raises:
        ValueError: Shapes or devices do not fit.
        TypeError: An element type is not one of the above.

    Source: LoRAC-IPC (arXiv 2504.13407): the composition, and the importance of a matrix.
    """
    if omega_scale is None:
        omega_scale = [1.0] * len(weight) if omega is not None else []
    y: torch.Tensor = torch.ops.ntkcl.composed_linear(
        x,
        weight,
        bias,
        down,
        up,
        list(scale),
        old_down,
        old_up,
        omega,
        list(omega_scale),
        composed,
        probe,
    )
    return y


def dissimilarity(
    features: torch.Tensor,
    labels: torch.Tensor,
    old: torch.Tensor,
    old_labels: torch.Tensor,
    *,
    kind: str = "infonce",
    temperature: float = 0.1,
) -> torch.Tensor:
    """A contrastive loss between a batch and kept features of old classes.

    With Z the unit rows of ``[features; old]``, y their labels and ``S = Z Z^T / temperature``:

    - ``"infonce"``: the mean over rows i of the batch that have a positive of
      ``logsumexp_{j != i} S_ij - mean_{p in P(i)} S_ip``;
    - ``"release"``, as the authors' code has it: ``log sum_{i != j, y_i = y_j} exp(S_ij) -
      mean_i logsumexp_{j != i} S_ij``.

    Without a positive pair the loss and its gradient are 0; nothing waits for the device.

    Args:
        features: (B, D), float32, float64 or bfloat16.
        labels: (B), int64.
        old: (R, D), of features' type and device; R may be 0.
        old_labels: (R), int64.
        kind: ``"infonce"`` or ``"release"``.
        temperature: Above 0.

    Returns:
        A scalar of features' type. features and old are differentiable.

    Raises:
        ValueError: Shapes or devices do not fit, an unknown kind, or a temperature not above 0.
        TypeError: An element type is not one of the above.

    Source: NTK-CL (arXiv 2407.17120), L_dis.
    """
    result: tuple[torch.Tensor, ...] = torch.ops.ntkcl.dissimilarity(
        features, labels, old, old_labels, kind, temperature
    )
    return result[0]


def feature_fusion(
    channel: torch.Tensor,
    patch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    head_mask: torch.Tensor | None = None,
    p: float = 0.0,
    value_scale: float = 0.5,
    patch_scale: float = 0.1,
) -> torch.Tensor:
    """The third representation of NTK-CL, of the features of its two sub-networks.

    ``value_scale * drophead(channel weight^T + bias) + channel + patch_scale * patch``: attention
    over one token is the identity, so its queries and keys take no part.

    Args:
        channel: (B, D), float32, float64 or bfloat16.
        patch: (B, D), of channel's type and device, as all that follow.
        weight: (D, D).
        bias: (D).
        head_mask: (B, H), uint8 or bool, 0 where a head is dropped, H a divisor of D; what is kept
            is divided by 1 - p. None: no dropout.
        p: The probability of a head being dropped, 0 <= p < 1.
        value_scale: Of the value.
        patch_scale: Of patch.

    Returns:
        (B, D), of channel's type. channel, patch, weight and bias are differentiable.

    Raises:
        ValueError: Shapes or devices do not fit, or p is out of range.
        TypeError: An element type is not one of the above.

    Source: NTK-CL (arXiv 2407.17120), the fusion of features.
    """
    fused: torch.Tensor = torch.ops.ntkcl.feature_fusion(
        channel, patch, weight, bias, head_mask, p, value_scale, patch_scale
    )
    return fused


def float8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as 8-bit floating point numbers, each with a scale that takes its largest entry to 448.

    ``torch._scaled_mm`` multiplies such matrices on GPUs from sm_90 on.

    Args:
        x: (..., K), float32 or bfloat16. Not differentiable.

    Returns:
        values, float8_e4m3fn of x's shape, rounded to even; and scale, float32 (..., 1), 1 for a
        row of zeros. x is about ``values * scale``: with an error of at most a 16th of an entry, or
        of 2**-10 times the scale where that is larger. Not a number where x is not finite.

    Raises:
        ValueError: x is a scalar.
        TypeError: The element type is not one of the above.
        RuntimeError: A gradient of the result is asked for.

    Source: Micikevicius et al. (arXiv 2209.05433), with a scale for each row.
    """
    values, scale = torch.ops.ntkcl.float8_rows(x)
    return values, scale


def gelu(x: torch.Tensor) -> torch.Tensor:
    """``x * Phi(x)``, Phi the normal distribution: GELU by its definition, not by tanh.

    Unlike ``x * (1 + erf(x / sqrt(2))) / 2`` it keeps its relative accuracy for negative x. On the
    CPU a normal result is within 8 units in the last place in float32, within 0.52 in bfloat16.

    Args:
        x: Any shape, float32, float64 or bfloat16. Copied first if it is not contiguous.

    Returns:
        Of x's shape and type, contiguous; differentiable.

    Raises:
        TypeError: The element type is not one of the above.

    Source: Hendrycks and Gimpel (arXiv 1606.08415).
    """
    y: torch.Tensor = torch.ops.ntkcl.gelu(x)
    return y


def parallel_adapter(
    x: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    *,
    scale: float = 1.0,
    residual: bool = False,
    p: float = 0.0,
    key: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """An adapter beside a frozen layer, or g of them side by side in one call.

    ``[x +] scale * (drop(relu(x down_weight^T + down_bias)) up_weight^T + up_bias)``. Keeps x and
    the r hidden units for the backward pass; scale and residual are folded into the products.

    Args:
        x: (..., C), float32, float64 or bfloat16; or (g, ..., C) for g adapters.
        down_weight: (r, C), of x's type and device as all weights; or (g, r, C).
        down_bias: (r), or (g, r).
        up_weight: (D, r), or (g, D, r).
        up_bias: (D), or (g, D).
        scale: Of what the adapter adds.
        residual: Whether x is added; D = C then.
        p: The probability of a hidden unit being dropped, 0 <= p < 1.
        key: One int64, on the CPU or on x's device: see :func:`bias_relu_dropout`.
        mask: Instead of a key, (..., r), uint8 or bool, 0 where dropped.

    Returns:
        (..., D), of x's type. x and all weights are differentiable.

    Raises:
        ValueError: Shapes or devices do not fit, p is out of range, or both key and mask are given.
        TypeError: An element type is not one of the above.

    Source: NTK-CL (arXiv 2407.17120), the channel sub-network; AdaptFormer (arXiv 2205.13535).
    """
    out: tuple[torch.Tensor, ...] = torch.ops.ntkcl.parallel_adapter(
        x, down_weight, down_bias, up_weight, up_bias, scale, residual, mask, key, p
    )
    return out[0]


def philox_keep_mask(key: torch.Tensor, size: Sequence[int], p: float) -> torch.Tensor:
    """The dropout mask that a key stands for: the one that ``bias_relu_dropout`` draws from it.

    Args:
        key: One int64. The mask is made on its device.
        size: The mask's shape.
        p: The probability of an element being dropped, 0 <= p < 1.

    Returns:
        uint8 of shape ``size``, 1 where kept. Element i in row-major order is kept iff the top 24
        bits of word i % 4 of Philox4x32-10 at counter i // 4 are at least p * 2**24.

    Raises:
        ValueError: A negative size, p out of range, or a key of more than one element.
        TypeError: The key is not int64.
    """
    mask: torch.Tensor = torch.ops.ntkcl.philox_keep_mask(key, size, p)
    return mask


def projection_energy(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """How much of rows at unit length lies in a subspace: ``mean_b |x^_b basis|^2``.

    As a loss it keeps new features orthogonal to old ones.

    Args:
        x: (B, D), float32, float64 or bfloat16; rows are divided by max(|x|, 1e-12).
        basis: (D, k), of x's type and device, orthonormal columns.

    Returns:
        A scalar of x's type, 0 to 1. x and basis are differentiable.

    Raises:
        ValueError: Shapes or devices do not fit.
        TypeError: An element type is not one of the above.

    Source: NTK-CL (arXiv 2407.17120), L_orth as the paper states it.
    """
    energy: torch.Tensor = torch.ops.ntkcl.projection_energy(x, basis)
    return energy


def residual_layer_norm(
    x: torch.Tensor,
    update: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + update`` and its LayerNorm, in one pass over memory.

    What stands between two parts of a transformer's block. Keeps the sum and two numbers a row for
    the backward pass, which adds the gradients of both results in one pass as well.

    Args:
        x: (..., C), float32, float64 or bfloat16: the residual stream.
        update: (..., C), of x's type, or bfloat16 beside float32; None: nothing is added.
        weight: (C), of x's type and device.
        bias: (C), of x's type and device.
        eps: Added to the variance, at least 0.
        dtype: Of the normalised result: x's type (the default), or bfloat16 beside float32.

    Returns:
        The sum (..., C) of x's type (x itself where there is no update), and its LayerNorm (..., C)
        of ``dtype``. Mean and variance are of the sum as it is returned, in float32 (float64 for
        float64). x, update, weight and bias are differentiable.

    Raises:
        ValueError: Shapes or devices do not fit, or eps is negative.
        TypeError: An element type is not one of the above.
    """
    out: tuple[torch.Tensor, ...] = torch.ops.ntkcl.residual_layer_norm(
        x, update, weight, bias, eps, dtype
    )
    return (x if update is None else out[0]), out[1]


def sam_ascend_(parameters: Tensors, saved: Tensors, gradients: Tensors, rho: float = 0.05) -> None:
    """The step up the slope of sharpness-aware minimisation: ``theta + rho g / |g|``.

    The norm is one over all gradients. ``sam_step_`` brings the parameters back, to the bit, and
    makes the step of the optimiser. ``ntkcl.optim.SAM`` is an optimiser made of both.

    Example:
        >>> sam_ascend_(parameters, saved, first := torch.autograd.grad(loss(), parameters))
        >>> second = torch.autograd.grad(loss(), parameters)
        >>> sam_step_(parameters, momenta, saved, first, second, lr=0.01)

    Args:
        parameters: Contiguous tensors, float32 or float64, of one type and device; changed.
        saved: As many contiguous tensors of the parameters' shapes, types and devices, which get
            what the parameters were; changed.
        gradients: As many tensors, of the parameters' shapes, types and devices.
        rho: Length of the step.

    Raises:
        ValueError: Shapes, devices or layouts do not fit, or a negative rho; nothing is changed
            then.
        TypeError: An element type is not one of the above.

    Source: Foret et al. (ICLR 2021); RAA, section on SAM+.
    """
    torch.ops.ntkcl.sam_ascend_(list(parameters), list(saved), list(gradients), rho)


def sam_step_(
    parameters: Tensors,
    momenta: Tensors,
    saved: Tensors,
    first_gradients: Tensors,
    gradients: Tensors,
    *,
    lr: float | Sequence[float],
    momentum: float = 0.9,
    weight_decay: float | Sequence[float] = 0.0,
    tau: float | None = 25.0,
    together: bool = False,
    stacked_dims: int | Sequence[int] = 0,
) -> torch.Tensor:
    """The step of SAM+ or SAM from the gradients up the slope, after ``sam_ascend_``.

        v <- momentum v + (gradient + weight_decay saved)
        theta <- saved - lr gamma v

    SAM+ damps with ``gamma = clamp(tau (1 - exp(cos(v, g) - 1)), 0, 1)``, g the first gradient,
    which for rho > 0 has the direction of the step up the slope, and the cosine 0 where v or g is:
    of each tensor, or by one cosine over all. SAM has gamma 1.

    Args:
        parameters: What ``sam_ascend_`` moved; changed.
        momenta: v, as many contiguous tensors of the parameters' shapes, types and devices, zeros
            at first; changed.
        saved: What ``sam_ascend_`` saved.
        first_gradients: g, those that ``sam_ascend_`` got; may be empty without tau.
        gradients: Those at the parameters that it left.
        lr: The learning rate, or one for each parameter.
        momentum: At least 0 and below 1.
        weight_decay: Added to the gradient; or one for each parameter.
        tau: How steeply SAM+ damps; None: SAM.
        together: One cosine over all parameters.
        stacked_dims: Leading dimensions over which each parameter is a stack of tensors that SAM+
            tells apart; or a number for each parameter.

    Returns:
        (rows), of the parameters' type: gamma of every tensor, those of a stack one by one.

    Raises:
        ValueError: Shapes, devices or layouts do not fit, or a number out of range; nothing is
            changed then.
        TypeError: An element type is not one of the above.

    Source: RAA, section on SAM+.
    """
    count = len(parameters)
    gammas: torch.Tensor = torch.ops.ntkcl.sam_step_(
        list(parameters),
        list(momenta),
        list(saved),
        list(first_gradients),
        list(gradients),
        _of_each(lr, count),
        _of_each(weight_decay, count),
        _of_each(stacked_dims, count),
        momentum,
        tau,
        together,
    )
    return gammas


def section_cosine(
    x: torch.Tensor, prototypes: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """``scores[i, k] = sum_s weights[s] * cos(x[i, s], prototypes[k, s])``, section by section.

    With one section, and the scale as ``weights``, this is a cosine classifier's logits. The
    norms are clamped from below at 1e-12, as in ``torch.nn.functional.normalize``.

    Args:
        x: (B, S*C), float32, float64 or bfloat16.
        prototypes: (n, S*C), of x's type and device.
        weights: (S), one per section, of x's type and device.

    Returns:
        (B, n), of x's type. All three arguments are differentiable.

    Raises:
        ValueError: Shapes or devices do not fit, or the columns cannot be split into S sections.
        TypeError: An element type is not one of the above.

    Source: NTK-CL (arXiv 2407.17120), the scores of the prototype classifier.
    """
    scores: torch.Tensor = torch.ops.ntkcl.section_cosine(x, prototypes, weights)
    return scores


def sgd_step_(
    parameters: Tensors,
    gradients: Tensors,
    momenta: Tensors = (),
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    anchors: Anchors = (),
    anchor_weight: float = 0.0,
    averages: Tensors = (),
    average_decay: float = 0.999,
) -> torch.Tensor:
    """A step of SGD with a pull to anchors and a running average of the parameters, in one sweep.

    For every parameter theta with its gradient g, in one pass over memory:

        g <- g + 2 anchor_weight (theta - anchor) + weight_decay theta
        v <- momentum v + g;  theta <- theta - lr v
        average <- average_decay average + (1 - average_decay) theta

    which is the gradient of a regulariser ``anchor_weight |theta - anchor|^2``, the step of
    ``torch.optim.SGD``, up to rounding, and an exponential moving average. No bits depend on how
    many threads there are.

    Args:
        parameters: Contiguous tensors, float32 or float64, of one type and device; changed.
        gradients: As many tensors, of the parameters' shapes, types and devices.
        momenta: v, as many contiguous ones, zeros at first; changed. Empty without momentum.
        lr: The learning rate.
        momentum: At least 0 and below 1.
        weight_decay: Added to the gradient.
        anchors: As many tensors like the parameters, None for those that are not pulled; or empty.
        anchor_weight: Of the regulariser; 0 without anchors.
        averages: As many contiguous tensors like the parameters, changed; or empty.
        average_decay: Of the average, at least 0 and below 1.

    Returns:
        A scalar of the parameters' type: the sum of ``|theta - anchor|^2`` before the step.

    Raises:
        ValueError: Shapes, devices or layouts do not fit, or a number out of range; nothing is
            changed then.
        TypeError: An element type is not one of the above.

    Source: NTK-CL (arXiv 2407.17120), the regulariser and the adaptive EMA of its adapters.
    """
    distance: torch.Tensor = torch.ops.ntkcl.sgd_step_(
        list(parameters),
        list(gradients),
        list(momenta),
        list(anchors),
        list(averages),
        lr,
        momentum,
        weight_decay,
        anchor_weight,
        average_decay,
    )
    return distance


def signed_projection(x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """``sum_b x^_b . direction`` over rows at unit length.

    With ``direction = 1 - U U^T 1`` it is the sum of all entries of ``x^ - U U^T x^``, with their
    signs: NTK-CL's L_orth as its authors' code computes it, in which U is constant for a task.

    Args:
        x: (B, D), float32, float64 or bfloat16; rows are divided by max(|x|, 1e-12).
        direction: (D), of x's type and device.

    Returns:
        A scalar of x's type. x and direction are differentiable.

    Raises:
        ValueError: Shapes or devices do not fit.
        TypeError: An element type is not one of the above.

    Source: NTK-CL (arXiv 2407.17120), L_orth as released.
    """
    total: torch.Tensor = torch.ops.ntkcl.signed_projection(x, direction)
    return total


def token_mix_prompts(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    *,
    carried: int = 0,
    scale: float = 1.0,
    eps: float = 1e-6,
    insert: bool = True,
) -> torch.Tensor:
    """Prompts mixed from an image's tokens, in their place behind the class token.

    ``prompts = LayerNorm(weight x0) * norm_weight + norm_bias + scale * q``, with x0 the N tokens
    of x without the prompts q that it carries from the block before. A bias of the mixing would be
    the same for all channels of a token, so that the LayerNorm took it away.

    Args:
        x: (B, N + carried, C), float32, float64 or bfloat16: the class token, the prompts carried,
            the others.
        weight: (P, N), of x's type and device, as the norm's.
        norm_weight: (C).
        norm_bias: (C).
        carried: How many prompts x carries: 0, or P.
        scale: Of the carried prompts in the new ones.
        eps: Added to the variance, at least 0.
        insert: Whether to return the whole sequence.

    Returns:
        (B, N + P, C), x with the new prompts on places 1 to P; or, without ``insert``, the prompts
        alone, (B, P, C). x, weight, norm_weight and norm_bias are differentiable.

    Raises:
        ValueError: Shapes or devices do not fit.
        TypeError: An element type is not one of the above.

    Source: NTK-CL (arXiv 2407.17120), the patch sub-network.
    """
    out: tuple[torch.Tensor, ...] = torch.ops.ntkcl.token_mix_prompts(
        x, weight, norm_weight, norm_bias, carried, scale, eps, insert
    )
    return out[0]


def _of_each(numbers: N | Sequence[N], count: int) -> list[N]:
    return list(numbers) if isinstance(numbers, Sequence) else [numbers] * count
