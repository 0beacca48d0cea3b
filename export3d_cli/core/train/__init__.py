"""Training: the stages of the paper and those beyond it, their losses and their data.

- `trainer`: runs the stages of a configuration in order; `training_run` keeps run folder, log and training state.
- `stage` is the loop of all stages, and there is a file for each: `clebs_stage`, `inpaint_stage` (mouth, eyes, lids),
  `image_stage` (reconstruction, adversarial), `pose_debias_stage`, `sampler_stage`.
- objective: `losses` sums its terms, those of `perceptual` and of `landmark_loss`; `discriminator`.
- data: `frame_cache` decodes datasets once, `pair_sampler` and `inpaint_data` draw batches from them.
- around them: `distributed` (torchrun), `cuda_graph`, `training_plan` (cost).

Only the core's public API and `evaluation` (for the perceptual distance) import it. It imports `model`, `face`,
`media`, `config` and `runtime`.
"""
