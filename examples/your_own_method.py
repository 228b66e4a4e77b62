"""Defines a method of continual learning, checks it, and compares it with finetuning.

    python examples/your_own_method.py

The method protects each parameter in proportion to its squared gradient instead of its absolute gradient. `Elastic` provides the
penalty, the anchor and the state; the subclass says what importance is.
"""

from functools import partial

from pytorch_metric_learning.losses import TripletMarginLoss

import mas_embed as me
from mas_embed.methods import Elastic
from mas_embed.testing import check_method


@me.METHODS.register("squared_sensitivity")  # the name in a config
class SquaredSensitivity(Elastic):
    """The penalty `strength * sum_p Omega_p (theta_p - anchor_p)^2`, Omega being the mean squared gradient of the projections.

    Args:
        model: any module that embeds a batch as [N, D].
        strength: >= 0; importance is scaled to a mean of 1.
    """

    def __init__(self, model, *, strength: float = 1.0):
        super().__init__(model, strength=strength, normalize=True)

    def estimate(self, batches):
        """The mean squared per-sample gradient, of unlabeled inputs."""
        return me.estimate_importance(self.model, batches, output="projection", exponent=2)


if __name__ == "__main__":
    check_method(SquaredSensitivity)
    print("check_method: the method keeps the contract of all methods")
    recipe = me.Recipe(epochs=3, sampler=partial(me.per_class_sampler, m=4))
    evaluator = me.RetrievalEvaluator(follow_index=False)
    for make_method in (me.Finetune, SquaredSensitivity):
        with me.seeded(0):
            model = me.small_conv()
        method = make_method(model)
        result = me.train_sequence(
            model, me.digits(), method=method, loss=TripletMarginLoss(margin=0.2), recipe=recipe, evaluator=evaluator
        )
        scores = result.scores["mean_average_precision"]
        print(f"{method.name:<18}  final average {scores.final_average:.3f}  forgetting {scores.forgetting:.3f}")
