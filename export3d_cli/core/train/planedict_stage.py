"""PlaneDict's training: the stage `planedict`, and the disentanglement loss of the stage `reconstruction`.

The stage teaches the encoder to read lambda from faces. A driver's face is that of another head on the same motion
track where there is one: the identity code of the source then has to tell what the tracker adds to the person's lambda,
and the motion code cannot. The codes then stay as they are: trained by the disentanglement loss they shrank to 0.
"""

import torch
from torch import Tensor

from export3d_cli.core.model.export3d import Export3D
from export3d_cli.core.model.planedict import PlaneDict
from export3d_cli.core.model.volume_renderer import project
from export3d_cli.core.train.stage import Stage, TrainingRun, is_finite
from export3d_cli.core.train.training_data import Batch, PairSampler

MOTION_WEIGHT = 1.5  # lambda_2 of eq. 6


class PlaneDictStage(Stage):
    """Trains the codes of `PlaneDict`, without rendering."""

    def __init__(self, run: TrainingRun, model: Export3D, sampler: PairSampler, *, is_new: bool) -> None:
        """`is_new` tells that the initial weights lack `PlaneDict`."""
        super().__init__(run, "planedict")
        assert model.planedict is not None
        self.config, self.model, self.sampler = run.config.planedict, model, sampler
        self.images_per_step = self.config.batch * run.world.size
        network = model.planedict
        self.parameters = [parameter for part in network.code_parts() for parameter in part.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.config.lr)
        self.saved_parts = {"model.": model, "": self.optimizer}
        with torch.no_grad():
            betas = torch.from_numpy(sampler.datasets[0].beta).to(run.device)
            tracked = model.expression.coefficients(betas)
            self.scale = tracked.std(0).clamp_min(1e-3)
            if is_new and run.resumed_state is None:  # start at the mean
                network.to_lambda.bias.copy_(tracked.mean(0))
                for layer in (network.to_lambda, network.resting_lambda):
                    layer.weight.mul_(self.scale[:, None])

    def draw(self, step: int) -> Batch:
        """Draw this process's pairs."""
        return self.sampler.draw_pairs(self.run.config.seed + self.run.world.rank, step, self.config.batch)

    def take_step(self, batch: Batch) -> dict[str, float]:
        """Read lambda from the drivers' faces and the sources' identity, and compare with the tracked one."""
        batch, model = batch.to(self.run.device), self.model
        assert model.planedict is not None
        self.optimizer.param_groups[0]["lr"] = self.config.lr * (1 - 0.9 * self.step / self.steps)
        source = model.planedict.encode(batch.source, project(batch.source_points, batch.source_camera)[0])
        read = model.planedict.read_lambda(model.planedict.encoder(batch.driver).motion, source.identity)
        with torch.no_grad():
            tracked = model.expression.coefficients(batch.target_own_beta)
        loss = ((read - tracked) / self.scale).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.run.world.average_gradients(self.parameters)
        terms = self.run.world.all_reduce_mean({"loss": float(loss.detach())})
        terms["grad"] = float(torch.nn.utils.clip_grad_norm_(self.parameters, 1.0))
        if is_finite(terms):
            self.optimizer.step()
        return terms


def disentanglement_loss(network: PlaneDict, batch: Batch, image: Tensor) -> Tensor:
    """Return L_dis of eq. 6: the result must have the codes of the source's identity and of the driver's motion."""
    source = network.encode(batch.source, project(batch.source_points, batch.source_camera)[0])
    driver, result = network.encoder(batch.driver), network.encode(image, batch.target_landmarks)
    identity = (source.identity - result.identity).norm(dim=1)
    return (identity + MOTION_WEIGHT * (driver.motion - result.motion).norm(dim=1)).mean()
