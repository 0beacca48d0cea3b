"""Training: the stages of the paper and those beyond it, their losses and their data.

- `trainer`: runs the stages of a configuration in order.
- `stage` holds the run (folder, log, training state) and the loop of all stages, and there is a file for each:
  `clebs_stage`, `inpaint_stage` (mouth, eyes, lids), `image_stage` (reconstruction, adversarial), `pose_debias_stage`,
  `sampler_stage`.
- objective: `losses` sums its terms, `perceptual` is one of them; `discriminator`.
- `training_data` decodes datasets once and draws batches from them.
- around them: `distributed` (torchrun), `training_plan` (cost).

Only the core's public API and `evaluation` (for the perceptual distance) import it. It imports `model`, `face`,
`media`, `config` and `runtime`.
"""
