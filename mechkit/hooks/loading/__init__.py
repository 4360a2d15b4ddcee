"""Making a `HookedModel`: one file per constructor, where model files are, and the checks of a loaded model."""
