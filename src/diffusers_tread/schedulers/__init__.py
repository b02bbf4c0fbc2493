# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Schedulers that diffusers does not have."""

from .registry import SCHEDULERS
from .scheduling_edm_heun import EDMHeunScheduler, EDMHeunSchedulerOutput
from .scheduling_flow_sde import FlowSDEScheduler, FlowSDESchedulerOutput


__all__ = ["EDMHeunScheduler", "EDMHeunSchedulerOutput", "FlowSDEScheduler", "FlowSDESchedulerOutput", "SCHEDULERS"]
