"""Training: the stages of the paper and those beyond it, their losses and their data.

- `trainer`: runs the stages of a configuration in order; `training_run` keeps run folder, log and training state.
- a file per stage: `clebs_stage`, `inpaint_stage` (mouth, eyes, lids), `image_stage` (reconstruction, adversarial),
  `pose_debias_stage`.
- objective: `objective` sums the terms of `losses`, `lpips`, `identity_loss`, `landmark_loss`; `discriminator`.
- data: `frame_cache` decodes datasets once, `pair_sampler` and `inpaint_data` draw batches from them.
- around them: `distributed` (torchrun), `cuda_graph`, `training_plan` (cost), `training_plots` and `linear_probe`
  (reports that need the extra `train`), `basis_rotation` (axes of lambda).

Only the core's public API and `evaluation` (for LPIPS) import it. It imports `model`, `face`, `media`, `config` and
`runtime`.
"""
