"""Training of the small embedded models: emoji artwork at 128x128, two stock diffusers pipelines and a scoring CLIP.

The order of the work is `data` (fetch, rasterise, caption, split) -> `train` (all stages, on one GPU) -> `export`
(stock pipeline folders with model cards) -> `samples` (contact sheets to be looked at).
"""
