"""The bundled model: its data, its training and its scoring.

`demo/model/` is an ordinary diffusers folder, and inference doesn't need this package.
The package is there to train the model from scratch (`python -m demo.train`) and to
score it (`python -m demo.score`).
"""
