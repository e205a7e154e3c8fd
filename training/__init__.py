"""Training of the small embedded models: emoji artwork at 128 x 128, two diffusers pipelines, a CLIP and a guard."""
