"""The paper's network, one box per file, and its weights files.

`export3d` wires `generator`, `expression`, `triplane`, `volume_renderer` and `super_resolution`. `source_view`, `warp`
(where in the photo a pixel comes from) and `inpaint` (what the photo does not show) go beyond the paper, and so does
`head_sampler`, which needs no photo. `fast` holds the inference paths. Imports only `config`, `runtime` and the
landmark indices of `face`. Imported by `animation`, `train`, `evaluation` and `diagnostics`; users go through
`export3d_cli.core`.
"""
