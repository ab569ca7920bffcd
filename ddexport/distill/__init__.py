"""Distilled Decoding: training a few-step student from a pre-trained auto-regressive teacher."""
