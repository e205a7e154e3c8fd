"""Measurements of images on disk: how diverse, how faithful to the prompt, and how sure one can be.

Nothing here knows which model or method made an image. Import from the submodules.
"""
