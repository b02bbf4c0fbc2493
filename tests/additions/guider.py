# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""A guider in one file: two weak branches, one routed and one without the condition, push apart."""

from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import GuiderOutput

from diffusers_tread import Branch, BranchGuidance, register_guider


class TwoWeakBranches(BranchGuidance):
    _input_predictions = ["strong", "routed", "null"]

    @register_to_config
    def __init__(self, scale: float = 1.5, selection_ratio: float = 0.5):
        super().__init__()

    def branches(self):
        routed = Branch(selection_ratio=self.config.selection_ratio, shares_prefix=True)
        return [Branch(), routed, Branch(condition="null")]

    def forward(self, strong, routed, null):
        weak = (routed + null) / 2
        return GuiderOutput(pred=weak + self.config.scale * (strong - weak), pred_cond=strong, pred_uncond=weak)


register_guider(TwoWeakBranches)
