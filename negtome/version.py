"""The version of the library, in a module that imports nothing: recipes keep it."""

__version__ = "0.1.0"
