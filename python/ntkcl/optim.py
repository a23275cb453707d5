"""The sharpness-aware optimisers of ntkcl, for use in any PyTorch model."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ntkcl import _C

__all__ = ["SAM"]

Closure = Callable[[], torch.Tensor]


class SAM(torch.optim.Optimizer):
    """SGD with momentum on gradients taken a step up the slope: SAM, and RAA's SAM+.

    A step asks the closure twice for gradients g, the second time at ``theta + e``:

        e = rho g / |g|,  one norm over all parameters
        v <- momentum v + (g(theta + e) + weight_decay theta)
        theta <- theta - lr gamma v

    SAM has gamma 1. SAM+ damps with ``gamma = clamp(tau (1 - exp(cos(v, e) - 1)), 0, 1)``, for each
    parameter (``gamma="tensor"``), or by one cosine over all (``"global"``). Sweeps over all
    parameters at once, on CPU and CUDA; nothing is read back to the host.

    Example:
        >>> optimizer = ntkcl.optim.SAM(model.parameters(), lr=0.01)
        >>> def closure():
        ...     loss = criterion(model(images), labels)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)

    Args:
        params: Contiguous float32 or float64 parameters, all of one type and device; or groups of
            them, dictionaries whose further keys are ``lr``, ``decays`` (False: no weight decay)
            and ``stacked_dims``: the leading dimensions over which each parameter is a stack of
            tensors that SAM+ tells apart.
        lr: The learning rate, of groups that have none of their own. Schedulers may change it.
        plus: SAM+; False: SAM.
        momentum: 0 <= momentum < 1.
        weight_decay: Added to the gradient.
        rho: Length of the step up the slope.
        tau: How steeply SAM+ damps.
        gamma: "tensor" or "global".

    Raises:
        ValueError: A parameter that cannot be trained with the others, a value out of range.
        TypeError: A parameter that is no tensor.

    Source: Foret et al. (ICLR 2021); RAA, section on SAM+.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        plus: bool = True,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        rho: float = 0.05,
        tau: float = 25.0,
        gamma: str = "tensor",
    ) -> None:
        self._core: _C.Optimizer | None = None
        super().__init__(params, {"lr": lr, "decays": True, "stacked_dims": 0})
        options = {
            "optimizer": "sam+" if plus else "sam",
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rho": rho,
            "tau": tau,
            "gamma": gamma,
        }
        groups = [
            _C.ParameterGroup(
                str(number),
                list(group["params"]),
                decays=group["decays"],
                stacked_dims=group["stacked_dims"],
            )
            for number, group in enumerate(self.param_groups)
        ]
        self._core = _C.make_optimizer(options, groups)
        self._set_rates()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """ValueError: all groups are given to the constructor."""
        if self._core is not None:
            raise ValueError("[SAM] expected all groups of parameters when it is made, got another")
        super().add_param_group(param_group)

    def step(self, closure: Closure | None = None) -> torch.Tensor:  # type: ignore[override]
        """One step; returns what the closure returned first, at the parameters themselves.

        Args:
            closure: Runs forward and backward passes. Gradients are undefined when it is called;
                one that it leaves undefined counts as zero.

        Raises:
            TypeError: No closure: SAM asks for gradients twice.
            ValueError: A gradient that does not fit its parameter.
        """
        if closure is None:
            raise TypeError(
                "[SAM] expected a closure, got none: a step asks for gradients at two places"
            )
        found: list[torch.Tensor] = []

        def gradients(_: int) -> None:
            with torch.enable_grad():
                found.append(closure())

        self._set_rates()
        self._optimizer().step(gradients)
        return found[0]

    def state_dict(self) -> dict[str, Any]:
        """The settings of the groups and the momentum, by names."""
        settings = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.param_groups
        ]
        return {
            "state": {name: value.clone() for name, value in self._optimizer().state().items()},
            "param_groups": settings,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What state_dict gave of an optimiser over parameters of the same shapes.

        Raises:
            ValueError: Other groups, or a momentum of other names or shapes; nothing is changed.
        """
        own, given = self._optimizer().state(), state_dict["state"]
        shapes = {name: tuple(value.shape) for name, value in own.items()}
        got = {name: tuple(value.shape) for name, value in given.items()}
        if got != shapes or len(state_dict["param_groups"]) != len(self.param_groups):
            raise ValueError(f"[SAM] expected the state of parameters {shapes}, got {got}")
        for name, value in given.items():
            own[name].copy_(value)
        for group, settings in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(settings)

    def _optimizer(self) -> _C.Optimizer:
        assert self._core is not None
        return self._core

    def _set_rates(self) -> None:
        for number, group in enumerate(self.param_groups):
            self._optimizer().set_learning_rate(float(group["lr"]), number)
