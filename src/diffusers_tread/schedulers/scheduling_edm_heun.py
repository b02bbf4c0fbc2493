# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""EDM's second-order stochastic sampler as a diffusers scheduler (Karras et al. 2022, arXiv 2206.00364, Algorithm 2).

Names follow the paper: `sigma` is a noise level, `gamma` its relative increase by churn, `sigma_hat` the level
after churn, `F` the network, `D` the denoiser that the preconditioning makes of it.
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
_TIMESTEP_TOLERANCE = 1e-5


@dataclass
class EDMHeunSchedulerOutput(BaseOutput):
    """What `EDMHeunScheduler.step` returns.

    Args:
        prev_sample: `[B, C, H, W]`, the sample for the next model call.
        pred_original_sample: `[B, C, H, W]`, the denoiser's estimate D(x; sigma) of the clean sample.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


def edm_preconditioning(sigma, sigma_data: float):
    """EDM's `(c_skip, c_out, c_in)`: D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4) (EDM, Table 1).

    Args:
        sigma: noise level, a positive float or a tensor of them.
        sigma_data: standard deviation of the data, positive.
    """
    total = (sigma**2 + sigma_data**2) ** 0.5
    return (sigma_data / total) ** 2, sigma * sigma_data / total, 1 / total


class EDMHeunScheduler(SchedulerMixin, ConfigMixin):
    r"""Heun's method with optional churn, for networks trained with EDM preconditioning (EDM, Algorithm 2).

    `num_inference_steps = N` costs 2N - 1 model calls, so `timesteps` has 2N - 1 entries. The two calls of a step are
    adjacent: the predictor at sigma_hat_i, then the corrector at sigma_{i+1}. The last step, to 0, is an Euler step.
    A timestep is ln(sigma) / 4 of the sample's actual noise level: a float, negative below sigma = 1.

    Churn needs no support from the loop: the noise that lifts a sample from sigma_i to sigma_hat_i is added at the end
    of the step that produced it, and `init_noise_sigma` includes it for the first step.

    Args:
        sigma_min: smallest noise level before 0, > 0.
        sigma_max: noise level that sampling starts from, >= `sigma_min`.
        sigma_data: standard deviation of the data, > 0, as in the network's training.
        sigma_schedule: `"karras"` (EDM, Equation 5) or `"exponential"` (evenly spaced in ln sigma).
        num_train_timesteps: how many noise levels `timesteps` lists before `set_timesteps` is called, >= 1.
        prediction_type: `"epsilon"` if the network's output is F, `"v_prediction"` if it is -F.
        rho: exponent of the Karras schedule, > 0.
        s_churn: amount of churn over the whole schedule, >= 0; 0 samples the ODE.
        s_tmin: churn only at sigma >= `s_tmin`.
        s_tmax: churn only at sigma <= `s_tmax`; `None` for no upper limit (infinity is not valid JSON).
        s_noise: factor on the standard deviation of the churn noise, >= 0.

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> import torch
        >>> from diffusers_tread.schedulers import EDMHeunScheduler
        >>> scheduler = EDMHeunScheduler(s_churn=40, s_tmin=0.05, s_tmax=50, s_noise=1.003)
        >>> scheduler.set_timesteps(18)
        >>> generator = torch.Generator().manual_seed(0)
        >>> latents = torch.randn(2, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
        >>> for t in scheduler.timesteps:
        ...     model_input = scheduler.scale_model_input(latents, t)
        ...     model_output = torch.zeros_like(model_input)  # a real model takes (model_input, t)
        ...     latents = scheduler.step(model_output, t, latents, generator=generator).prev_sample
        >>> len(scheduler.timesteps), latents.shape
        (35, torch.Size([2, 4, 8, 8]))
    """

    _compatibles = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
    order = 2

    @register_to_config
    def __init__(
        self,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: Literal["karras", "exponential"] = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
        rho: float = 7.0,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float | None = None,
        s_noise: float = 1.0,
    ):
        # Checks.
        rules = {
            "sigma_min > 0": 0 < sigma_min < math.inf,
            "sigma_max >= sigma_min": sigma_min <= sigma_max < math.inf,
            "sigma_data > 0": 0 < sigma_data < math.inf,
            "sigma_schedule 'karras' or 'exponential'": sigma_schedule in ("karras", "exponential"),
            "num_train_timesteps >= 1": num_train_timesteps >= 1,
            "prediction_type 'epsilon' or 'v_prediction'": prediction_type in ("epsilon", "v_prediction"),
            "rho > 0": 0 < rho < math.inf,
            "s_churn >= 0": s_churn >= 0,
            "s_tmin >= 0": s_tmin >= 0,
            "s_tmax >= s_tmin, or None": s_tmax is None or s_tmax >= s_tmin,
            "s_noise >= 0": 0 <= s_noise < math.inf,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"Expected {rule}, got {self.config[rule.split()[0]]!r}. Correct that argument.")

        # A schedule until `set_timesteps` is called.
        self.num_inference_steps = None
        self.init_noise_sigma = float(sigma_max)
        self._use_levels([*self._schedule(num_train_timesteps), 0.0], device=None)

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
        """Sets the noise levels of one sampling run; call it before each run.

        Args:
            num_inference_steps: N >= 1; may be left out if `sigmas` is given.
            device: device of `timesteps`.
            sigmas: the N noise levels to use instead of the configured schedule: positive, strictly decreasing,
                without the final 0, which is appended.

        Raises:
            ValueError: if neither is given, they disagree, or a value is outside its range.
        """
        # N levels, given or from the schedule.
        if sigmas is None:
            if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
                raise ValueError(
                    f"Expected num_inference_steps to be an integer >= 1, got {num_inference_steps!r}. "
                    "Pass it, or the noise levels as sigmas=[...]."
                )
            sigmas = self._schedule(num_inference_steps)
        sigmas = [float(sigma) for sigma in sigmas]
        if num_inference_steps is not None and num_inference_steps != len(sigmas):
            raise ValueError(
                f"Expected num_inference_steps to be the number of sigmas ({len(sigmas)}), got {num_inference_steps}. "
                "Pass one of the two."
            )
        decreasing = all(next_sigma < sigma for sigma, next_sigma in zip(sigmas, sigmas[1:], strict=False))
        if not (sigmas and decreasing and 0 < sigmas[-1] and sigmas[0] < math.inf):
            raise ValueError(
                f"Expected sigmas to be finite, positive and strictly decreasing, got {sigmas}. "
                "The final 0 is appended by the scheduler: leave it out."
            )

        # The level of each model call (Algorithm 2, lines 4 to 6): sigma_hat_0, then sigma_i and sigma_hat_i.
        sigma_hats = [sigma * (1 + self._gamma(sigma, len(sigmas))) for sigma in sigmas]
        levels = [level for pair in zip(sigmas, sigma_hats, strict=True) for level in pair][1:]

        # x_hat_0 is noise of sigma_0 plus independent churn noise: one Gaussian with the sum of their variances.
        churn_variance = self.config.s_noise**2 * (sigma_hats[0] ** 2 - sigmas[0] ** 2)
        self.init_noise_sigma = (sigmas[0] ** 2 + churn_variance) ** 0.5
        self.num_inference_steps = len(sigmas)
        self._use_levels([*levels, 0.0], device=device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Lets sampling start at `timesteps[begin_index]`, as image-to-image pipelines do.

        Args:
            begin_index: index of the step times `order`; even, because a run starts with the first of a step's calls.

        Raises:
            ValueError: if it is odd or outside `timesteps`.
        """
        self._require_timesteps()
        if not 0 <= begin_index < len(self.timesteps) or begin_index % self.order:
            raise ValueError(
                f"Expected begin_index to be even and in [0, {len(self.timesteps)}), got {begin_index}. "
                "Use the index of the step times scheduler.order."
            )
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Index into `timesteps` of the step that starts at `timestep`, always the first of its two calls.

        Raises:
            ValueError: if no step starts there.
        """
        value = float(timestep)
        index = min(range(0, len(self.timesteps), self.order), key=lambda i: abs(self._c_noise[i] - value))
        if abs(self._c_noise[index] - value) > _TIMESTEP_TOLERANCE:
            raise ValueError(
                f"Expected a timestep at which a step starts, got {value}. Start from an even entry of "
                "scheduler.timesteps."
            )
        return index

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """The network's input, c_in(sigma) x.

        Args:
            sample: `[B, C, H, W]`, the sample at this timestep.
            timestep: the entry of `timesteps` to call the network with.
        """
        sigma = self._levels[self._next_index(timestep)]
        return sample * edm_preconditioning(sigma, self.config.sigma_data)[2]

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
        ) -> EDMHeunSchedulerOutput: ...
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
    ) -> EDMHeunSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Moves the sample on by one model call: half a Heun step (EDM, Algorithm 2, lines 6 to 11).

        Computes in float32 (float64 for float64 samples). It never reads a value from an accelerator, except for the
        first timestep of a run without `set_begin_index`.

        Args:
            model_output: `[B, C, H, W]`, the network's F(c_in x; timestep).
            timestep: the entry of `timesteps` the network was called with.
            sample: `[B, C, H, W]`, the sample before `scale_model_input`.
            generator: source of the churn noise; a list has one generator per sample.
            return_dict: `False` returns the tuple `(prev_sample, pred_original_sample)`.

        Returns:
            Both tensors in the dtype of `sample`.

        Raises:
            ValueError: if the call is out of order, the timestep is an integer, or shapes or generators do not match.
        """
        # Noise levels of this call and the next.
        self._check_step(model_output, sample, generator)
        index = self._next_index(timestep)
        self._check_order(timestep, index)
        sigma, next_sigma = self._levels[index : index + 2]
        dtype = torch.promote_types(sample.dtype, torch.float32)

        # Denoise (Equation 7) and take the slope of the probability-flow ODE there.
        x = sample.to(dtype)
        c_skip, c_out, _ = edm_preconditioning(sigma, self.config.sigma_data)
        if self.config.prediction_type == "v_prediction":
            c_out = -c_out
        denoised = c_skip * x + c_out * model_output.to(dtype)
        slope = (x - denoised) / sigma

        if index % 2 == 0:
            # Euler step from sigma_hat_i to sigma_{i+1}; the last one, to 0, gets no correction.
            x_next = x + (next_sigma - sigma) * slope
            self._predictor = (x, slope) if next_sigma > 0 else None
        else:
            # Second-order correction: redo the step with the mean of both slopes.
            (x_hat, slope_hat), self._predictor = self._predictor, None
            x_next = x_hat + (sigma - self._levels[index - 1]) * 0.5 * (slope_hat + slope)

            # Churn for the next step: from sigma_{i+1} to sigma_hat_{i+1}.
            churn = self.config.s_noise * (next_sigma**2 - sigma**2) ** 0.5
            if churn > 0:
                x_next = x_next + churn * randn_tensor(x.shape, generator=generator, device=x.device, dtype=dtype)

        # The result, in the sample's dtype.
        self._step_index = index + 1
        prev_sample, pred_original_sample = x_next.to(sample.dtype), denoised.to(sample.dtype)
        if not return_dict:
            return prev_sample, pred_original_sample
        return EDMHeunSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x + sigma noise, with the noise level of each timestep, sigma = exp(4 timestep).

        Args:
            original_samples: `[B, C, H, W]`, clean samples.
            noise: `[B, C, H, W]`, standard normal.
            timesteps: `[B]` or `[1]`, floats, entries of `self.timesteps` or any other ln(sigma) / 4.

        Raises:
            ValueError: if the timesteps are integers.
        """
        if not torch.is_floating_point(timesteps):
            raise ValueError(f"Expected floating-point timesteps, ln(sigma) / 4, got {timesteps.dtype}.")
        dtype = torch.promote_types(original_samples.dtype, torch.float32)
        sigma = (4 * timesteps.to(original_samples.device, dtype)).exp()
        sigma = sigma.reshape(-1, *[1] * (original_samples.ndim - 1))
        return (original_samples.to(dtype) + sigma * noise.to(dtype)).to(original_samples.dtype)

    def _schedule(self, num_steps: int) -> list[float]:
        """`num_steps` noise levels from sigma_max to sigma_min; for one step only sigma_max."""
        low, high, rho = self.config.sigma_min, self.config.sigma_max, self.config.rho
        ramp = [i / max(num_steps - 1, 1) for i in range(num_steps)]
        if self.config.sigma_schedule == "exponential":
            return [high * (low / high) ** r for r in ramp]
        return [(high ** (1 / rho) + r * (low ** (1 / rho) - high ** (1 / rho))) ** rho for r in ramp]

    def _gamma(self, sigma: float, num_steps: int) -> float:
        """Relative increase of the noise level by churn before the step from `sigma` (EDM, Algorithm 2, line 1)."""
        s_tmax = math.inf if self.config.s_tmax is None else self.config.s_tmax
        churned = self.config.s_tmin <= sigma <= s_tmax
        return min(self.config.s_churn / num_steps, 2**0.5 - 1) if churned else 0.0

    def _use_levels(self, levels: list[float], device: str | torch.device | None) -> None:
        # Python floats besides the tensors: arithmetic with them never waits for an accelerator.
        self._levels = levels
        self._c_noise = [0.25 * math.log(sigma) for sigma in levels[:-1]]
        self.sigmas = torch.tensor(levels, dtype=torch.float32)
        self.timesteps = torch.tensor(self._c_noise, dtype=torch.float32, device=device)
        self._step_index = None
        self._begin_index = None
        self._predictor: Any = None

    def _require_timesteps(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError("Expected set_timesteps to be called before sampling: call scheduler.set_timesteps(N).")

    def _next_index(self, timestep: float | torch.Tensor) -> int:
        """Index of the current model call; the first one of a run is found from its timestep."""
        self._require_timesteps()
        is_tensor = isinstance(timestep, torch.Tensor)
        if isinstance(timestep, int) or (is_tensor and not (timestep.is_floating_point() and timestep.numel() == 1)):
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

    def _check_order(self, timestep: float | torch.Tensor, index: int) -> None:
        # On an accelerator the timestep is not checked: reading it would stall every step.
        if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu":
            return
        if abs(float(timestep) - self._c_noise[index]) > _TIMESTEP_TOLERANCE:
            raise ValueError(
                f"Expected timesteps[{index}] = {self._c_noise[index]:.6g} next, got {float(timestep):.6g}. "
                "Step through scheduler.timesteps in order, and call set_timesteps before each run."
            )

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
