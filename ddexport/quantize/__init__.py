"""Graphs whose large products compute in 8-bit integers, calibrated without data.

A student's inputs are Gaussian noise and labels, so samples of them are free, exact and reproducible:
`calibration` draws them and notes what every product reads. `policy` says which products are quantised, `qdq`
puts QuantizeLinear and DequantizeLinear around them, and `graphs` makes the graphs of a bundle.
docs/export.md gives the reasons and the figures.
"""
