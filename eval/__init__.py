"""Measurements of images on disk, and how certain they are. No module knows which model or method made an image."""
