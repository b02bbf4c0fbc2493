# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The reverse SDE of flow matching as a diffusers scheduler (SiT, Ma et al. 2024, arXiv 2401.08740).

The direction is diffusers': t = 1 is noise, x_t = (1 - t) x + t noise, the network predicts v = noise - x. Names
follow the paper: `w` is the diffusion coefficient, `score` the gradient of ln p_t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..typed_config import register_to_config


if TYPE_CHECKING:
    from typing_extensions import Self


# Distance up to which a timestep counts as one of the schedule: far above float32 rounding, far below any step.
_TIMESTEP_TOLERANCE = 1e-3


@dataclass
class FlowSDESchedulerOutput(BaseOutput):
    """What `FlowSDEScheduler.step` returns.

    Args:
        prev_sample: `[B, C, H, W]`, the sample for the next model call.
        pred_original_sample: `[B, C, H, W]`, the network's estimate x - t v of the clean sample.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class FlowSDEScheduler(SchedulerMixin, ConfigMixin):
    r"""The Euler-Maruyama method for the reverse SDE of flow matching, one model call per step.

    dx = [v - w(t) / 2 * score] dt + sqrt(w(t)) dW, from t = 1 to 0, has the same distribution at each t as the ODE
    dx = v dt, for any w >= 0 (arXiv 2401.08740). With x_t = (1 - t) x + t noise the score is
    -(x_t + (1 - t) v) / t. The last of the N steps, from `last_step_size` to 0, follows the drift and adds no noise.

    REPA's published sampler uses N = 250, `last_step_size=0.04` and w(t) = 2 t. SiT's code has the same last step, and
    its noise and score terms act as if w were twice each of its diffusion coefficients, including sigma_t. Hence the
    default of `diffusion_scale`.

    Args:
        num_train_timesteps: the network is called with `num_train_timesteps` * t, >= 1.
        shift: t becomes shift t / (1 + (shift - 1) t), as in `FlowMatchEulerDiscreteScheduler`; > 0.
        diffusion_form: `"sigma"` for w = `diffusion_scale` t, `"sin2"` for w = `diffusion_scale` sin^2(pi t).
        diffusion_scale: factor of w, >= 0: 2 as in the published code, 1 for exactly w = sigma_t, 0 for the ODE.
        last_step_size: t at which the last step starts, before the shift, in (0, 1).

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> import torch
        >>> from diffusers_tread.schedulers import FlowSDEScheduler
        >>> scheduler = FlowSDEScheduler()
        >>> scheduler.set_timesteps(25)
        >>> generator = torch.Generator().manual_seed(0)
        >>> latents = torch.randn(2, 4, 8, 8, generator=generator)
        >>> for t in scheduler.timesteps:
        ...     model_output = torch.zeros_like(latents)  # a real model takes (latents, t)
        ...     latents = scheduler.step(model_output, t, latents, generator=generator).prev_sample
        >>> scheduler.timesteps[[0, -1]].tolist(), latents.shape
        ([1000.0, 40.0], torch.Size([2, 4, 8, 8]))
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        diffusion_form: Literal["sigma", "sin2"] = "sigma",
        diffusion_scale: float = 2.0,
        last_step_size: float = 0.04,
    ):
        # Checks.
        rules = {
            "num_train_timesteps >= 1": num_train_timesteps >= 1,
            "shift > 0": 0 < shift < math.inf,
            "diffusion_form 'sigma' or 'sin2'": diffusion_form in ("sigma", "sin2"),
            "diffusion_scale >= 0": 0 <= diffusion_scale < math.inf,
            "last_step_size in (0, 1)": 0 < last_step_size < 1,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"Expected {rule}, got {self.config[rule.split()[0]]!r}. Correct that argument.")

        # A schedule until `set_timesteps` is called.
        self.num_inference_steps = None
        levels = [i / num_train_timesteps for i in range(num_train_timesteps, 0, -1)]
        self._use_levels(levels, device=None)

    @property
    def step_index(self) -> int | None:
        """Index into `timesteps` of the next model call; `None` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index into `timesteps` of the first model call, if `set_begin_index` set it."""
        return self._begin_index

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Sets the times of one sampling run; call it before each run.

        Args:
            num_inference_steps: N >= 1; may be left out if `sigmas` is given. With N = 1 the only step, from t = 1,
                is the last.
            device: device of `timesteps`.
            sigmas: the N times to use, before the shift, instead of even ones from 1 to `last_step_size`: in (0, 1],
                strictly decreasing, without the final 0, which is appended.

        Raises:
            ValueError: if neither is given, they disagree, or a value is outside its range.
        """
        # N times, given or even ones.
        if sigmas is None:
            if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
                raise ValueError(
                    f"Expected num_inference_steps to be an integer >= 1, got {num_inference_steps!r}. "
                    "Pass it, or the times as sigmas=[...]."
                )
            width = (1 - self.config.last_step_size) / max(num_inference_steps - 1, 1)
            sigmas = [1 - i * width for i in range(num_inference_steps)]
        sigmas = [float(sigma) for sigma in sigmas]
        if num_inference_steps is not None and num_inference_steps != len(sigmas):
            raise ValueError(
                f"Expected num_inference_steps to be the number of sigmas ({len(sigmas)}), got {num_inference_steps}. "
                "Pass one of the two."
            )
        decreasing = all(next_sigma < sigma for sigma, next_sigma in zip(sigmas, sigmas[1:], strict=False))
        if not (sigmas and decreasing and 0 < sigmas[-1] and sigmas[0] <= 1):
            raise ValueError(
                f"Expected sigmas in (0, 1] and strictly decreasing, got {sigmas}. "
                "The final 0 is appended by the scheduler: leave it out."
            )
        self.num_inference_steps = len(sigmas)
        self._use_levels(sigmas, device=device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Lets sampling start at `timesteps[begin_index]`, as image-to-image pipelines do."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Index of `timestep` in `timesteps`. Raises ValueError if it is not one of them."""
        value, scale = float(timestep), self.config.num_train_timesteps
        index = min(range(len(self.timesteps)), key=lambda i: abs(scale * self._levels[i] - value))
        if abs(scale * self._levels[index] - value) > _TIMESTEP_TOLERANCE:
            raise ValueError(f"Expected one of scheduler.timesteps, got {value}. Loop over the timesteps themselves.")
        return index

    def diffusion_coefficient(self, t: float) -> float:
        """w(t), for t in [0, 1]."""
        form = t if self.config.diffusion_form == "sigma" else math.sin(math.pi * t) ** 2
        return self.config.diffusion_scale * form

    def scale_noise(self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """(1 - t) sample + t noise, for image-to-image.

        Args:
            sample: `[B, C, H, W]`, clean samples.
            timestep: `[B]` or `[1]`, `num_train_timesteps` * t.
            noise: `[B, C, H, W]`, standard normal.
        """
        dtype = torch.promote_types(sample.dtype, torch.float32)
        t = timestep.to(sample.device, dtype).reshape(-1, *[1] * (sample.ndim - 1)) / self.config.num_train_timesteps
        return ((1 - t) * sample.to(dtype) + t * noise.to(dtype)).to(sample.dtype)

    if TYPE_CHECKING:

        @property
        def config(self) -> Any: ...

        @classmethod
        def from_config(cls, config: Any = None, **kwargs: Any) -> Self: ...

        @overload
        def step(
            self,
            model_output: torch.Tensor,
            timestep: float | torch.Tensor,
            sample: torch.Tensor,
            *,
            generator: torch.Generator | list[torch.Generator] | None = None,
            return_dict: Literal[True] = True,
        ) -> FlowSDESchedulerOutput: ...
        @overload
        def step(
            self,
            model_output: torch.Tensor,
            timestep: float | torch.Tensor,
            sample: torch.Tensor,
            *,
            generator: torch.Generator | list[torch.Generator] | None = None,
            return_dict: Literal[False],
        ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowSDESchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One step of the Euler-Maruyama method.

        Computes in float32 (float64 for float64 samples). It never reads a value from an accelerator, except for the
        first timestep of a run without `set_begin_index`.

        Args:
            model_output: `[B, C, H, W]`, the network's v.
            timestep: the entry of `timesteps` the network was called with.
            sample: `[B, C, H, W]`, x_t.
            generator: source of the noise; a list has one generator per sample.
            return_dict: `False` returns the tuple `(prev_sample, pred_original_sample)`.

        Returns:
            Both tensors in the dtype of `sample`.

        Raises:
            ValueError: if no step is left, the timestep is an integer, or shapes or generators do not match.
        """
        # The interval.
        self._check_step(model_output, sample, generator)
        index = self._next_index(timestep)
        t, next_t = self._levels[index : index + 2]
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x, v = sample.to(dtype), model_output.to(dtype)

        # Drift of the reverse SDE.
        w = self.diffusion_coefficient(t)
        score = -(x + (1 - t) * v) / t
        x_next = x + (next_t - t) * (v - 0.5 * w * score)

        # Noise, except in the last step.
        if w > 0 and next_t > 0:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=dtype)
            x_next = x_next + (w * (t - next_t)) ** 0.5 * noise

        # The result, in the sample's dtype.
        self._step_index = index + 1
        prev_sample, pred_original_sample = x_next.to(sample.dtype), (x - t * v).to(sample.dtype)
        if not return_dict:
            return prev_sample, pred_original_sample
        return FlowSDESchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _use_levels(self, levels: list[float], device: str | torch.device | None) -> None:
        # Python floats besides the tensors: arithmetic with them never waits for an accelerator.
        shift = self.config.shift
        self._levels = [shift * t / (1 + (shift - 1) * t) for t in levels] + [0.0]
        self.sigmas = torch.tensor(self._levels, dtype=torch.float32)
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self._step_index = None
        self._begin_index = None

    def _next_index(self, timestep: float | torch.Tensor) -> int:
        """Index of the current model call; the first one of a run is found from its timestep."""
        if self.num_inference_steps is None:
            raise ValueError("Expected set_timesteps to be called before sampling: call scheduler.set_timesteps(N).")
        if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
            raise ValueError(
                f"Expected timestep to be one of scheduler.timesteps, a float, got {timestep!r}. "
                "Loop over the timesteps themselves, not over their indices."
            )
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        if self._step_index >= len(self.timesteps):
            raise ValueError(
                f"Expected {len(self.timesteps)} model calls, got one more. Call set_timesteps before the next run."
            )
        return self._step_index

    @staticmethod
    def _check_step(model_output, sample, generator) -> None:
        if model_output.shape != sample.shape:
            raise ValueError(
                f"Expected model_output to have the sample's shape {tuple(sample.shape)}, "
                f"got {tuple(model_output.shape)}. Split off a learned variance first."
            )
        if isinstance(generator, list) and len(generator) != sample.shape[0]:
            raise ValueError(
                f"Expected one generator per sample ({sample.shape[0]}), got {len(generator)}. "
                "Pass that many, or a single generator."
            )
