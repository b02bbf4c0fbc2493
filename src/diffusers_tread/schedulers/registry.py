# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The schedulers by class name: those that a repository on the Hub may contain and that are loaded with our code."""

from diffusers import SchedulerMixin

from .scheduling_edm_heun import EDMHeunScheduler
from .scheduling_flow_sde import FlowSDEScheduler


SCHEDULERS: dict[str, type[SchedulerMixin]] = {kind.__name__: kind for kind in (EDMHeunScheduler, FlowSDEScheduler)}
