"""The bundled model: what it draws, how it is trained, how it is scored.

`demo/model/` is an ordinary diffusers folder; nothing at inference needs this
package. It exists so that the folder can be made again from nothing
(`python -m demo.train`) and judged (`python -m demo.score`).
"""
