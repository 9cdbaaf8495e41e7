"""From training runs to model bundles and back: build.py makes the bundles, origins.py takes both up for a training.

Stands on gan/ and detect/, which know nothing of it.
"""
