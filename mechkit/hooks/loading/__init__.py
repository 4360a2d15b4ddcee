"""Making a `HookedModel`: one constructor a file, where files are, and what is checked before a model is believed."""
